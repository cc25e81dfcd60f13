"""One worker in a process of its own, without Ray: the store, the text encoder, the shipped model, the result store.

The process is one that a test may kill: its job's id may say where it dies by itself. A `poison` kills every worker
that begins it; `begin`, `step`, `decode`, `put` and `manifest` kill the first that comes to that place.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from support.history import Entry, Heard, Late, line_of

from serve.diffusion.engine import Engine, Work
from serve.diffusion.ladder import Ladder
from serve.diffusion.profile import Profile
from serve.diffusion.run import Picture
from serve.diffusion.rungs import descend
from serve.diffusion.runner import Latents, Runner, open_runner
from serve.diffusion.scheduler import Row, StepScheduler
from serve.diffusion.state import Source
from serve.domain.jobs import JobState
from serve.domain.text import EncodeUnit
from serve.encoders.cache import EmbeddingCache, Fetched
from serve.encoders.forward import TextTower
from serve.encoders.pool import EncoderPool
from serve.encoders.registry import register
from serve.errors import LeaseLost
from serve.health import stall_s
from serve.jobs.store import Claim, JobStore, Want
from serve.jobs.terms import Hold
from serve.models import resolve
from serve.placements import Placement
from serve.prompts.plan import Planner
from serve.reports import cost_here, report_of
from serve.results.store import ResultStore, open_store
from serve.rungs import Rung
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics
from serve.worker import Worker

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Of glibc's mallopt."""
PLACES = ("begin", "step", "decode", "put", "manifest")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """`settings` as JSON of the tree; `folder` is where it writes what it was told, and where it has died once;
    `clock_s` is how wrong its clock goes. `memory_mb` is said to be its card's, `largest_mb` that of the largest card
    of the settings; `cap_mb` are those beyond its model that it really gets, 0 for no bound."""

    name: str
    settings: dict[str, Any]
    folder: str
    batch: int = 4
    clock_s: float = 0.0
    memory_mb: int = 0
    largest_mb: int = 0
    cap_mb: int = 0


class Deaths:
    """Where the process ends itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def at(self, place: str, job_id: str) -> None:
        kind = job_id.partition("-")[0]
        if kind == "poison" or (kind == place and self._first(job_id)):
            os.kill(os.getpid(), signal.SIGKILL)

    def _first(self, job_id: str) -> bool:
        try:
            (self._folder / f"died-{job_id}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class MortalRunner(Runner):
    """The runner, and the deaths on its way."""

    def __init__(self, runner: Runner, deaths: Deaths) -> None:
        super().__init__(runner.family)
        self._deaths = deaths
        self._released: dict[int, str] = {}

    def begin(self, row: Row, work: Work, source: Source | None) -> None:
        super().begin(row, work, source)
        self._deaths.at("begin", work.run_id.partition(":")[0])

    def step(self, rows: Sequence[Row], most: int | None = None) -> dict[Row, Exception]:
        failed = super().step(rows, most)
        for row in rows:
            self._deaths.at("step", row.run_id.partition(":")[0])
        return failed

    def release(self, row: Row) -> Latents:
        latents = super().release(row)
        self._released[id(latents)] = row.run_id.partition(":")[0]
        return latents

    def decode(self, latents: Latents, side: int | None = None) -> Picture:
        self._deaths.at("decode", self._released.pop(id(latents), ""))
        return super().decode(latents, side)


class MortalJobs(JobStore):
    """The store, and a note of each word that counted or came too late: claims, renewals, settlements.

    Their times are of `time.monotonic`, which all processes of a machine share.
    """

    def __init__(self, settings: Settings, notes: Path) -> None:
        super().__init__(settings.jobs, InProcessMetrics())
        self._notes = notes
        self._first: dict[tuple[str, int, str], float] = {}

    async def claim(self, worker: str, wants: Sequence[Want], *, idle: bool = True, **more: Any) -> Claim | Hold | None:
        asked = time.monotonic()
        claim = await super().claim(worker, wants, idle=idle, **more)
        if isinstance(claim, Claim):
            told = time.monotonic()
            self._note(Heard(job=claim.job_id, fence=claim.fence, what="claimed", asked=asked, told=told))
        return claim

    async def renew(self, claim: Claim, step: int = 0, state: JobState = JobState.RUNNING) -> bool:
        with self._noted(claim, "renewed", time.monotonic()):
            return await super().renew(claim, step, state)

    async def succeed(self, claim: Claim, **outcome: Any) -> Any:
        with self._settled(claim, "succeeded"):
            return await super().succeed(claim, **outcome)

    async def fail(self, claim: Claim, *args: Any, **outcome: Any) -> None:
        with self._settled(claim, "failed"):
            await super().fail(claim, *args, **outcome)

    async def cancelled(self, claim: Claim) -> None:
        with self._settled(claim, "cancelled"):
            await super().cancelled(claim)

    async def release(self, claim: Claim) -> None:
        with self._settled(claim, "release"):
            await super().release(claim)

    def _settled(self, claim: Claim, outcome: str) -> contextlib.AbstractContextManager[None]:
        """A settlement may be repeated when its answer was lost: then it counts since it was first asked for."""
        return self._noted(
            claim, outcome, self._first.setdefault((claim.job_id, claim.fence, outcome), time.monotonic())
        )

    @contextlib.contextmanager
    def _noted(self, claim: Claim, what: str, asked: float) -> Iterator[None]:
        try:
            yield
        except LeaseLost:
            told = time.monotonic()
            self._note(Late(job=claim.job_id, fence=claim.fence, what=what, asked=asked, told=told))
            raise
        self._note(Heard(job=claim.job_id, fence=claim.fence, what=what, asked=asked, told=time.monotonic()))

    def _note(self, entry: Entry) -> None:
        with self._notes.open("a", encoding="utf-8") as file:
            file.write(line_of(entry))


def mortal(results: ResultStore, deaths: Deaths) -> ResultStore:
    """Dies after the first put of an image, and after the manifest's."""
    put = results.put

    async def put_and_die(key: str, *args: Any, **options: Any) -> Any:
        stored = await put(key, *args, **options)
        deaths.at("manifest" if "manifest" in key else "put", key.partition("/")[0])
        return stored

    results.put = put_and_die  # type: ignore[method-assign]
    return results


async def cap_memory(runner: Runner, megabytes: int) -> None:
    """From here on this process gets so much memory more; then allocations fail, torch's and everybody's.

    What is freed goes back at once, so that the bound is the same for the first image and the last. A thread's stack
    counts whole: those of the event loop are there before.
    """
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 1 << 16), (_M_TRIM_THRESHOLD, 1 << 17)):
        assert ctypes.CDLL(None).mallopt(option, value)
    threads = min(32, (os.cpu_count() or 1) + 4)
    barrier = threading.Barrier(threads)
    await asyncio.gather(*(asyncio.to_thread(barrier.wait) for _ in range(threads)))
    runner.measure((8, 8), 2)
    runner.family.vae.decode(torch.zeros(1, 4, 8, 8))
    ctypes.CDLL(None).malloc_trim(0)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + (megabytes << 20),) * 2)


def data_bytes() -> int:
    """What counts against that bound now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmData")))


async def serve(plan: WorkerPlan) -> None:
    """Work until SIGTERM, then drain."""
    settings, folder = Settings.model_validate(plan.settings), Path(plan.folder)
    deaths = Deaths(folder)
    metrics = InProcessMetrics()
    model = resolve(settings.model, Path())
    registry = register([model], settings)
    pool = EncoderPool(TextTower.load(registry.encoders[0], "cpu"), registry.encoders[0], settings, metrics)

    async def encode(units: Sequence[EncodeUnit]) -> Sequence[Fetched]:
        """As the replicas' clients do: the pool is told of a Redis that is away."""
        return await pool.encode(units, embeddings.redis_away)

    embeddings = EmbeddingCache(settings.cache, encode, metrics, place="diffusion")
    runner = MortalRunner(open_runner(model, settings.diffusion), deaths)
    profile = Profile(plan.batch)
    jobs = MortalJobs(settings, folder / f"words-{plan.name}.jsonl")
    placement = Placement(
        name="a card",
        model=model.name,
        gpu_class=None,
        settings=settings.diffusion,
        max_pixels=1 << 22,
        memory_bytes=plan.memory_mb * 10**6,
    )
    ladder = Ladder(Rung.RESIDENT, Rung(settings.diffusion.worst_rung), partial(descend, runner.family))
    if plan.cap_mb:
        await cap_memory(runner, plan.cap_mb)
    worker = Worker(
        name=plan.name,
        placement=placement,
        settings=settings.jobs,
        jobs=jobs,
        planner=Planner(model, registry.sources(model.name)),
        embeddings=embeddings,
        engine=Engine(runner, StepScheduler(profile), profile, metrics, ladder=ladder),
        results=mortal(open_store(settings.results, settings.data_dir), deaths),
        metrics=metrics,
        batch=lambda: plan.batch,
        report=partial(report_of, plan.name, placement, profile, runner.family.vae.scale_factor),
        cost_of=partial(cost_here, profile, runner.family.vae.scale_factor),
        spool_bytes=settings.results.spool_bytes,
        stall_s=partial(stall_s, settings.diffusion, "cpu"),
        placements=[placement, replace(placement, name="the largest", memory_bytes=plan.largest_mb * 10**6)],
    )
    (folder / f"ready-{plan.name}").touch()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await worker.drain(settings.diffusion.drain_s)
    await jobs.close()


def main(plan: WorkerPlan) -> None:
    """The process. It ends with the one that started it."""
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    if plan.clock_s:
        true = time.time
        time.time = lambda: true() + plan.clock_s
    logging.basicConfig(
        filename=Path(plan.folder) / f"{plan.name}.log", level=logging.INFO, format="%(asctime)s %(name)s %(message)s"
    )
    asyncio.run(serve(plan))


if __name__ == "__main__":
    main(WorkerPlan(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
