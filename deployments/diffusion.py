"""The diffusion replicas of one placement. They take no orders: a Worker pulls jobs from the store."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import platform
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import ray
from ray.serve.handle import DeploymentHandle

from deployments import began
from deployments.exits import on_sigterm
from deployments.metrics import tell_device, telling
from deployments.parts import Parts, open_parts, open_text
from deployments.step_times import StepTimes
from serve.devices import card_here, check_memory, stand_back, use_cores
from serve.diffusion.engine import Engine
from serve.diffusion.families.base import Family
from serve.diffusion.ladder import Ladder, first_that_loads
from serve.diffusion.profile import Profile, open_profile
from serve.diffusion.rungs import descend
from serve.diffusion.runner import Runner, open_runner
from serve.diffusion.scheduler import StepScheduler
from serve.health import stall_s
from serve.jobs.terms import WorkerReport
from serve.placements import Placement, plan_placements, setting_of
from serve.replica_plan import card_use, planned_here, tell_plan
from serve.reports import Pace, cost_here, report_of
from serve.rungs import MEANS, Rung
from serve.scaling.start import Laps
from serve.settings.tree import Settings
from serve.telemetry.tracing import CLOSE_S, open_tracing
from serve.wants import batch_of
from serve.worker import RELEASE_S, Worker

IMPORTED_AT = time.time()
CPU_NICENESS = 1
"""Of a denoiser that computes on the cores which also answer clients and keep the leases: enough for a session of its
own (`stand_back`), which is what keeps the others quick. More only takes throughput away."""
LEAVING_S = 8.0
"""Of the grace that Serve gives: for giving back what is not finished, and for closing everything."""


def own_grace_s(drain_s: float) -> float:
    """Seconds for what a replica has in hand, of those that Serve gives it: the rest is for leaving in order."""
    return max(drain_s - LEAVING_S, drain_s / 2)


class Diffusion:
    """One denoiser on one device, or a fraction of it.

    Owns: the Engine, and the Worker that feeds it.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, placement: str, encoders: Mapping[str, DeploymentHandle]
    ) -> None:
        """`placement` by its name; `encoders` by fingerprint."""
        laps = Laps(began.AT)
        laps.lap("imports", IMPORTED_AT)
        laps.lap("Serve")
        parts = await open_parts(settings, placement)
        laps.lap("settings, models' files, stores")
        placements = plan_placements(settings, parts.catalog.drawn)
        place = next(each for each in placements if each.name == placement)
        model = parts.catalog.drawn[place.model]
        assert model.denoiser is not None  # models that are drawn have one
        place, runner, profile = await asyncio.to_thread(_load, settings, place, parts, laps)
        # The node first: which of them holds what is seen in the jobs' records.
        node = ray.get_runtime_context().get_node_id()
        name = f"{node}:{platform.node()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._grace_s = own_grace_s(place.settings.drain_s)
        self._metrics = parts.metrics
        self._jobs = parts.jobs
        self._tracing = open_tracing(settings.tracing, "diffusion", name)
        self._text = open_text(settings, parts, encoders, "diffusion", name)
        niceness = CPU_NICENESS if runner.family.device.type == "cpu" else 0
        if niceness:
            await asyncio.to_thread(stand_back, niceness)
        ladder = Ladder(runner.family.rung, Rung(place.settings.worst_rung), partial(_descend, runner.family))
        on_cores = partial(use_cores, place.settings.torch_threads, CPU_NICENESS)
        self._engine = Engine(runner, StepScheduler(profile), profile, parts.metrics, niceness, ladder, on_cores)
        self._step_times = StepTimes(self._engine, profile, runner.family.vae.scale_factor)
        planner = parts.catalog.planner(model.name)
        laps.lap("tokenizers, threads")
        self._start = laps.start
        self._worker = Worker(
            name=name,
            placement=place,
            settings=settings.jobs,
            jobs=parts.jobs,
            planner=planner,
            embeddings=self._text.embeddings,
            engine=self._engine,
            results=parts.results,
            metrics=parts.metrics,
            batch=partial(batch_of, model.denoiser, profile.lanes),
            report=partial(self._report, name, place, profile, runner.family.vae.scale_factor),
            cost_of=partial(cost_here, profile, runner.family.vae.scale_factor),
            spool_bytes=settings.results.spool_bytes,
            stall_s=lambda: stall_s(place.settings, runner.family.device.type, self._engine.rung),
            tracing=self._tracing,
            placements=placements,
            start_s=sum(self._start.phases.values()),
        )
        self._undo = on_sigterm(self._leave, 2 * RELEASE_S + CLOSE_S)

    def describe(self) -> str:
        return f"{self._worker.rows} images in hand"

    async def benchmark(self, width: int, height: int, steps: int) -> dict[int, list[float]]:
        """`StepTimes.measure`: it slows the jobs in hand down for as long. Raises Busy, OutOfMemory."""
        return await self._step_times.measure(width, height, steps)

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        self._tell()
        if ailment := self._worker.ailment:
            raise RuntimeError(ailment)

    async def __del__(self) -> None:
        """Serve awaits this before it ends the process, for as long as the deployment's grace."""
        async with telling(self._tell):
            await (self._worker.abandon() if self._worker.hangs else self._worker.drain(self._grace_s))
        self._undo()
        traced = [] if self._tracing is None else [self._tracing.close()]
        await asyncio.gather(*traced, self._text.close(), self._jobs.close())

    def _report(self, name: str, place: Placement, profile: Profile, vae_factor: int, pace: Pace) -> WorkerReport:
        own = report_of(name, place, profile, vae_factor, pace)
        return replace(own, rung=self._engine.rung, card=card_use(place), start=self._start)

    async def _leave(self) -> None:
        await self._worker.abandon()
        if self._tracing is not None:
            await self._tracing.close()

    def _tell(self) -> None:
        self._metrics.tell_again()
        tell_device(self._metrics, "diffusion")


def _descend(family: Family, rung: Rung) -> None:
    """Take the replica down to a rung; to the CPU's as one that begins there."""
    descend(family, rung)
    if not MEANS[rung].on_card:
        stand_back(CPU_NICENESS)


def _load(settings: Settings, place: Placement, parts: Parts, laps: Laps) -> tuple[Placement, Runner, Profile]:
    """The placement as it is planned here, its model on its device, and what is known of its steps there. Raises
    OperatorError naming the setting."""
    gpu = settings.gpu_classes[place.gpu_class] if place.gpu_class is not None else None
    if gpu is not None:
        check_memory(place.settings.device, gpu.memory_gb, setting_of(settings, place.name, "gpu_class"))
    model = parts.catalog.drawn[place.model]
    place = planned_here(place, model, card_here(place.settings.device))
    tell_plan(place)
    own = place.settings.model_copy(update={"max_pixels": place.max_pixels})
    budget = None if place.plan is None else place.plan.budget
    dtypes = gpu.dtypes if gpu else ()
    runner = first_that_loads(
        place.rung,
        Rung(own.worst_rung),
        lambda rung: open_runner(model, own, dtypes, rung=rung, budget=budget),
        parts.metrics,
        asked=None if own.rung == "auto" else own.best_rung,
    )
    if place.plan is not None:
        runner.family.vae.tile_of = place.plan.tile_of  # larger images may need smaller tiles
    laps.lap("weights")
    device = "cpu" if runner.family.device.type == "cpu" else f"gpu-{os.environ.get('CUDA_VISIBLE_DEVICES', '')}"
    with _alone(settings.data_dir / "profiles" / f"{platform.node()}-{device}.lock"):
        profile = open_profile(runner, model, own, settings.data_dir)
    laps.lap("profile")
    return place, runner, profile


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One replica after another measures its steps on a device: what they take while others measure is kept too."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without a folder to write to, they keep nothing
            place.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(place.open("w")), fcntl.LOCK_EX)
        yield
