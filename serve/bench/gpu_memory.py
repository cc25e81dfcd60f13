"""What a model takes of a card in each phase, against what the planner says of it. Each under its plan's own cap."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from serve.bench.footprints import Living
from serve.bench.random_models import draw, latents_of, random_family, random_work
from serve.devices import device_errors, grow_segments, memory_fraction
from serve.diffusion.engine import Engine, OnRelief
from serve.diffusion.families.base import Family
from serve.diffusion.ladder import Ladder
from serve.diffusion.profile import Profile
from serve.diffusion.runner import Latents, Runner
from serve.diffusion.scheduler import StepScheduler
from serve.diffusion.synthetic import synthetic_lanes
from serve.domain.jobs import Relief
from serve.errors import DeviceLost, TandemError
from serve.memory.planner import Plan
from serve.memory.terms import ModelShape
from serve.rungs import Rung
from serve.telemetry.metrics import InProcessMetrics

PHASES = ("weights", "step", "decode", "encode")
SMALL = (16, 16)
"""Latents that take next to no memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """Bytes that a phase takes on top of what lies there; of `weights`, all that lies there."""

    phase: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Above 0 where more was predicted than was taken."""
        return self.predicted / self.measured - 1 if self.measured else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One model on one rung in a process that may allocate `cap` bytes. `phases` are those that were measured, all but
    where `trouble` says why not. Then images were drawn one after another, each decoded while the next one stepped or
    between its steps, as the rung has it: `peak` is what lay there at most, `relief` what had to be done about memory
    that ran out. `reserved` is the most that the allocator took of the card. Both are 0 where they can't be told."""

    model: str
    gpu_class: str
    rung: Rung
    dtype: str
    width: int
    height: int
    lanes: int
    cap: int
    phases: tuple[PhaseMemory, ...]
    peak_predicted: int
    peak: int = 0
    relief: tuple[str, ...] = ()
    reserved: int = 0
    trouble: str = ""

    @property
    def fits(self) -> bool:
        """As it was planned, with nothing given up."""
        return not self.trouble and not self.relief


class Meter(ABC):
    """The bytes of one device."""

    @abstractmethod
    def weights(self, family: Family) -> int:
        """What lies there for a family that has computed nothing yet."""

    @abstractmethod
    def taken(self, family: Family, call: Callable[[], object]) -> int:
        """The most that `call` has there at a time, on top of what lay there before."""

    @property
    def reserved(self) -> int:
        """The most that the allocator took of the device since this meter was made."""
        return 0


class CudaMeter(Meter):
    """By the allocator's own statistics. What lay on the card when it was made is nobody's."""

    def __init__(self) -> None:
        empty_card()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        self._reserved = 0

    def weights(self, family: Family) -> int:
        torch.cuda.synchronize()
        return int(torch.cuda.memory_allocated() - self._before)

    def taken(self, family: Family, call: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        lay = torch.cuda.memory_allocated()
        self._reserved = self.reserved
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - lay)

    @property
    def reserved(self) -> int:
        return max(self._reserved, int(torch.cuda.max_memory_reserved()))


class CountingMeter(Meter):
    """By counting tensors while they live: for devices whose allocator tells nothing."""

    def weights(self, family: Family) -> int:
        tensors = [*family.denoiser.parameters(), *family.denoiser.buffers()]
        return int(family.vae.nbytes + sum({id(each): each.nbytes for each in tensors}.values()))

    def taken(self, family: Family, call: Callable[[], object]) -> int:
        with Living(family.denoiser) as living:
            call()
        return int(living.peak)


def meter_of(device: torch.device) -> Meter:
    return CudaMeter() if device.type == "cuda" else CountingMeter()


def measure_held(shape: ModelShape, plan: Plan, gpu_class: str, device: torch.device) -> Held:
    """The model as its plan has it, in a process that is held to the plan's budget. What goes wrong, memory that runs
    out or a library that is missing, is the answer's `trouble`. Raises DeviceLost."""
    phases: list[PhaseMemory] = []
    peak, relief, trouble = 0, tuple[str, ...](), ""
    with capped(device, plan.budget):
        meter = meter_of(device)
        try:
            peak, relief = _measure(shape, plan, device, meter, phases)
        except DeviceLost:
            raise
        except TandemError as error:
            trouble = f"{[*PHASES, 'drawing'][len(phases)]}: {error.message}"
        reserved = meter.reserved
    return Held(
        model=shape.name,
        gpu_class=gpu_class,
        rung=plan.rung,
        dtype=plan.dtype,
        width=plan.width,
        height=plan.height,
        lanes=shape.lanes,
        cap=plan.budget,
        phases=tuple(phases),
        peak_predicted=plan.footprint.peak,
        peak=peak,
        relief=relief,
        reserved=reserved,
        trouble=trouble,
    )


def _measure(
    shape: ModelShape, plan: Plan, device: torch.device, meter: Meter, phases: list[PhaseMemory]
) -> tuple[int, tuple[str, ...]]:
    """Appends to `phases` as it goes; then `Held.peak` and `Held.relief`."""
    family = random_family(shape, device, getattr(torch, plan.dtype), plan.rung)
    family.vae.tile = plan.tile
    runner, latents = Runner(family), latents_of(shape, (plan.width, plan.height))
    weights, told = meter.weights(family), list[Relief]()
    phases.append(PhaseMemory(phase="weights", predicted=plan.footprint.weights, measured=weights))
    # Once before it counts: what cuBLAS keeps for itself, for each stream, is no phase's.
    runner.measure(latents, 1)
    decode(runner, SMALL)
    calls: Mapping[str, Callable[[], object]] = {
        "step": lambda: runner.measure(latents, shape.lanes),
        "decode": lambda: decode(runner, latents),
        "encode": lambda: encode(family, (plan.width, plan.height)),
    }
    for phase, call in calls.items():
        taken = meter.taken(family, call)
        phases.append(PhaseMemory(phase=phase, predicted=getattr(plan.footprint, phase), measured=taken))
    taken = meter.taken(family, lambda: _draw(runner, shape, plan, told.append))
    return weights + taken if taken else 0, tuple(dict.fromkeys(f"{each.phase}: {each.measure}" for each in told))


def _draw(runner: Runner, shape: ModelShape, plan: Plan, told: OnRelief) -> None:
    """Three images of the planned size, one in a step."""
    profile = Profile(1)
    ladder = Ladder(plan.rung, plan.rung)
    engine = Engine(runner, StepScheduler(profile), profile, InProcessMetrics(), 0, ladder)
    size = plan.width, plan.height
    try:
        draw(engine, [random_work(runner, shape, size, seed, steps) for seed, steps in enumerate((1, 2, 3))], told)
    finally:
        engine.stop()


def decode(runner: Runner, shape: tuple[int, int]) -> None:
    """An image of noise, of that latent height and width."""
    runner.decode(Latents(synthetic_lanes(runner.family, shape, 1)[0].latents, None, tiny=False))


def encode(family: Family, size: tuple[int, int]) -> None:
    """A black image of that width and height."""
    with device_errors("the VAE"):
        family.vae.encode(torch.zeros(1, 3, size[1], size[0]))


@contextmanager
def capped(device: torch.device, budget: int | None) -> Iterator[None]:
    """Meanwhile this process may allocate so many bytes of the card, and none of what came before is in its way."""
    if device.type != "cuda":
        yield
        return
    grow_segments()
    empty_card()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(memory_fraction(1, budget, total) or 1.0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        empty_card()


def empty_card() -> None:
    """Nothing stays there of what was computed before, for a cap to count."""
    gc.collect()
    if torch.cuda.is_available():
        # cuBLAS keeps a workspace for every stream that ever multiplied, and every runner has one of its own.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def worst_error(held: Sequence[Held]) -> float | None:
    """The largest error of any phase, as a share; None where nothing was measured."""
    errors = [abs(phase.error) for one in held for phase in one.phases]
    return max(errors, default=None)
