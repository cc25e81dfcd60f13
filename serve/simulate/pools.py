"""A pool's placement, its step times and what its replicas would report: made by the planner, without a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from serve.diffusion import curves as by_curve
from serve.diffusion.curves import Curve, best_lanes
from serve.diffusion.scheduler import LatentShape
from serve.errors import OperatorError
from serve.jobs.terms import StepCurve, WorkerReport
from serve.memory.classes import GpuClass
from serve.memory.planner import Plan
from serve.memory.planner import plan as plan_size
from serve.memory.speed import Speed, predicted
from serve.memory.terms import ModelShape
from serve.placements import Placement, held_size, plan_share
from serve.relief import memory_mb
from serve.settings.pools import DiffusionSettings
from serve.simulate.fleet import Fleet
from serve.simulate.fleet_parts import Pool

MOST_PIXELS = 2048 * 2048
"""What the server's settings let in by default (`limits.max_side`)."""
AREAS = (0.25, 0.5, 1.0, 1.5, 2.25, 4.0)
"""Sizes whose step times are predicted, as shares of the model's own size."""


class StepTimes:
    """What bounds the steps of a pool's replicas, and what they take: to a replica what `Profile` is.

    Owns: the caps and step times that were asked for.
    """

    def __init__(self, max_batch_size: int, curves: Sequence[Curve]) -> None:
        """`curves` are in rising order of area."""
        self.max_batch_size = max_batch_size
        self.curves = tuple(curves)
        self._caps: dict[LatentShape, int] = {}
        self._ms: dict[tuple[LatentShape, int], float] = {}

    def lanes(self, shape: LatentShape) -> int:
        """The most of a step."""
        found = self._caps.get(shape)
        if found is None:
            most = min(2 * self.max_batch_size, by_curve.cap(self.curves, shape))
            found = self._caps[shape] = max(1, most)
        return found

    def step_ms(self, shape: LatentShape, lanes: int) -> float:
        found = self._ms.get((shape, lanes))
        if found is None:
            found = self._ms[shape, lanes] = by_curve.step_ms(self.curves, shape, lanes)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlan:
    """What one pool of the fleet comes to. `decode_ms` is of a megapixel; `beside` says whether it goes on beside
    steps."""

    name: str
    about: Pool
    shape: ModelShape
    placement: Placement
    times: StepTimes
    decode_ms: float
    beside: bool

    @property
    def batch(self) -> int:
        """As `serve.wants.batch_of`: how many images as most order them fill a step."""
        factor = self.shape.vae_scale_factor
        lanes = self.times.lanes((self.shape.default_height // factor, self.shape.default_width // factor))
        return max(1, lanes // self.shape.lanes)

    @property
    def report(self) -> WorkerReport:
        settings = self.placement.settings
        return WorkerReport(
            name=self.name,
            model=self.placement.model,
            placement=self.name,
            gpu_class=self.placement.gpu_class,
            max_pixels=self.placement.max_pixels,
            max_rows=max(settings.max_rows, settings.max_batch_size),
            batch=settings.max_batch_size,
            vae_factor=self.shape.vae_scale_factor,
            curves=tuple(StepCurve(height=one.shape[0], width=one.shape[1], ms=one.ms) for one in self.times.curves),
            decode_ms_per_megapixel=self.decode_ms,
            memory_mb=memory_mb(self.placement),
        )


def plan_pools(fleet: Fleet) -> Mapping[str, PoolPlan]:
    """By name, those with replicas. Raises OperatorError: a class that does not hold the model, one whose speed is not
    known, a fleet without any replica."""
    found = {name: _planned(fleet, name, pool) for name, pool in fleet.pools.items() if pool.most}
    if not found:
        raise OperatorError("pools: none has replicas", "fleet")
    return {
        name: replace(each, placement=replace(each.placement, smaller=_smaller(each, list(found.values()))))
        for name, each in found.items()
    }


def _planned(fleet: Fleet, name: str, pool: Pool) -> PoolPlan:
    shape, gpu, own = fleet.shape(name), fleet.gpu(pool.gpu_class), fleet.diffusion_settings(name)
    made = plan_share(own, shape, gpu.memory_bytes, gpu.dtypes, own.max_pixels or MOST_PIXELS)
    if not made.fits:
        text = f"pools.{name}: {gpu.memory_gb:g} GB do not hold {shape.name} down to the rung {made.rung}"
        raise OperatorError(text, "fleet")
    placement = Placement(
        name=name,
        model=pool.model,
        gpu_class=pool.gpu_class,
        settings=own,
        max_pixels=own.max_pixels or min(made.max_pixels, MOST_PIXELS),
        rung=made.rung,
        plan=made,
        memory_bytes=int(gpu.memory_bytes),
        shape=shape,
    )
    curves = _measured(pool, shape) if pool.curves else _predicted(name, shape, gpu, made, own)
    decode_ms = pool.decode_ms_per_megapixel or _decode_ms(name, shape, gpu, made)
    return PoolPlan(
        name=name,
        about=pool,
        shape=shape,
        placement=placement,
        times=StepTimes(own.max_batch_size, curves),
        decode_ms=decode_ms,
        beside=made.footprint.beside,
    )


def _smaller(one: PoolPlan, pools: Sequence[PoolPlan]) -> int:
    """`Placement.smaller`."""
    own = one.placement
    others = (each.placement.max_pixels for each in pools if each.placement.model == own.model)
    return max((pixels for pixels in others if pixels < own.max_pixels), default=0)


def _measured(pool: Pool, shape: ModelShape) -> tuple[Curve, ...]:
    factor = shape.vae_scale_factor
    found = [
        Curve((each.height // factor, each.width // factor), dict(each.ms), each.cap or max(each.ms))
        for each in pool.curves
    ]
    return tuple(sorted(found, key=lambda curve: curve.area))


def _predicted(name: str, shape: ModelShape, gpu: GpuClass, made: Plan, own: DiffusionSettings) -> tuple[Curve, ...]:
    """A curve for each size of AREAS that the card holds, to as many lanes as its memory does."""
    base, factor, found = made.width * made.height, shape.vae_scale_factor, {}
    for share in AREAS:
        width, height = held_size(made.width, made.height, round(share * base))
        grid = shape.size_multiple
        width, height = width // grid * grid, height // grid * grid
        held = plan_size(
            shape,
            gpu.memory_bytes,
            gpu.dtypes,
            width=width,
            height=height,
            dtype=made.dtype,
            best=made.rung,
            worst=made.rung,
        )
        if not held.fits:
            continue
        most = max(1, min(held.lanes // shape.lanes, own.max_batch_size))
        sizes = sorted({most, *(each for each in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if each < most)})
        ms = {shape.lanes * images: _step_ms(name, shape, gpu, held, images) for images in sizes}
        found[height // factor, width // factor] = Curve((height // factor, width // factor), ms, best_lanes(ms))
    return tuple(sorted(found.values(), key=lambda curve: curve.area))


def _step_ms(name: str, shape: ModelShape, gpu: GpuClass, plan: Plan, images: int) -> float:
    """Of one step of so many images: all that is predicted of them but the decoding."""
    terms = _speed(name, shape, gpu, plan, images).terms
    return 1000 * sum(term.seconds for term in terms if term.name != "decoding")


def _decode_ms(name: str, shape: ModelShape, gpu: GpuClass, plan: Plan) -> float:
    terms = _speed(name, shape, gpu, plan, 1).terms
    seconds = sum(term.seconds for term in terms if term.name == "decoding")
    return 1000 * seconds / (plan.width * plan.height / 1e6)


def _speed(name: str, shape: ModelShape, gpu: GpuClass, plan: Plan, images: int) -> Speed:
    speed = predicted(shape, gpu, plan, 1, images)
    if speed is None:
        raise OperatorError(f"pools.{name}: the speed of {gpu.name} is not known; write its `curves`", "fleet")
    return speed
