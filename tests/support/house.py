"""A job store, a result store, and diffusion workers that share them: all real, without Ray between them."""

import asyncio
import contextlib
import functools
import inspect
import io
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from PIL import Image
from pydantic import SecretStr

from serve.diffusion.engine import Engine
from serve.diffusion.ladder import Ladder
from serve.diffusion.profile import Profile
from serve.diffusion.runner import Runner, open_runner
from serve.diffusion.scheduler import Row, StepScheduler
from serve.domain.jobs import Job, JobEvent
from serve.domain.orders import ImageRequest
from serve.domain.text import EncodeUnit
from serve.embedded import EmbeddedRedis
from serve.encoders.cache import EmbeddingCache, Fetched
from serve.encoders.forward import TextTower
from serve.encoders.pool import EncoderPool
from serve.encoders.registry import Registry, register
from serve.errors import BackendUnavailable
from serve.jobs.events import follow
from serve.jobs.store import JobStore
from serve.jobs.sweeper import sweep
from serve.jobs.terms import WorkerReport
from serve.models import ModelFolder, resolve
from serve.placements import Placement
from serve.prompts.plan import Planner
from serve.reports import Pace, cost_here, report_of
from serve.results.store import ResultStore, open_store
from serve.settings.pools import DiffusionSettings, ModelSettings
from serve.settings.stores import JobSettings, ResultSettings
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics
from serve.telemetry.tracing import Tracing
from serve.worker import Worker

LONG = 150
GRACE_S = 60.0


@dataclass(frozen=True)
class Parts:
    """Of the shipped model: what takes long to load."""

    model: ModelFolder
    registry: Registry
    tower: TextTower
    runner: Runner


@functools.cache
def parts() -> Parts:
    """Loaded once for all tests of the process. The runner is for one engine at a time."""
    model = resolve(ModelSettings(), Path())
    registry = register([model], Settings(data_dir=Path(tempfile.gettempdir())))
    return Parts(model, registry, TextTower.load(registry.encoders[0], "cpu"), a_runner(model))


def a_runner(model: ModelFolder) -> Runner:
    return open_runner(model, DiffusionSettings(device="cpu", torch_threads=1))


class GatedRunner(Runner):
    """Makes `free` steps; the next one begins, says so in `reached`, and hangs until `gate` is opened."""

    def __init__(self, runner: Runner, free: int = 0) -> None:
        super().__init__(runner.family)
        self.free = free
        self.gate, self.reached = Event(), Event()

    def step(self, rows: Sequence[Row], most: int | None = None) -> dict[Row, Exception]:
        if self.free:
            self.free -= 1
        else:
            self.reached.set()
            assert self.gate.wait(60)
        return super().step(rows, most)


class House:
    """Owns: the job store, the encoder pool, and the sweeper while it is one.

    `encoder_away` and `encoder_hangs` are the faults of the encoder.
    """

    def __init__(self, url: str, folder: Path, *, lease_s: float = 0.6, **settings: Any) -> None:
        """`settings` are further ones of the jobs. Retries wait for nothing unless these say otherwise."""
        self.settings = JobSettings(redis_url=SecretStr(url), lease_s=lease_s, **{"retry_backoff_s": 0.0} | settings)
        self.metrics = InProcessMetrics()
        self.jobs = JobStore(self.settings, self.metrics)
        self.folder = folder
        self.parts = parts()
        self.model = self.parts.model
        self.runner = self.parts.runner
        self.placement = self.a_placement()
        self.placements: Sequence[Placement] = ()
        self.batch = 4
        self.results = open_store(ResultSettings(), folder)
        self.planner = Planner(self.model, self.parts.registry.sources(self.model.name))
        self.pool = EncoderPool(self.parts.tower, self.parts.registry.encoders[0], Settings(), self.metrics)
        self.encoder_away = False
        self.encoder_hangs = asyncio.Event()
        self.sweeping: asyncio.Task[None] | None = None
        self.sweep()

    def a_placement(self, max_rows: int = 32) -> Placement:
        own = DiffusionSettings(max_batch_size=4, max_rows=max_rows)
        return Placement(name="a card", model=self.model.name, gpu_class=None, settings=own, max_pixels=1 << 20)

    def sweep(self) -> None:
        """Begin to."""
        self.sweeping = asyncio.create_task(sweep(self.jobs, self.results, self.settings.lease_s, interval_s=0.1))

    async def stop_sweeping(self) -> None:
        """Lapsed leases stay with their workers."""
        if self.sweeping is not None:
            self.sweeping.cancel()
            await asyncio.wait([self.sweeping])

    async def encode(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
        if self.encoder_hangs.is_set():
            await asyncio.Event().wait()
        if self.encoder_away:
            raise BackendUnavailable("the encoder pool does not answer")
        return await self.pool.encode(units)

    @contextlib.asynccontextmanager
    async def worker(
        self,
        name: str = "worker",
        runner: Runner | None = None,
        *,
        jobs: JobStore | None = None,
        results: ResultStore | None = None,
        spool_bytes: int = 1 << 28,
        stall_s: float = 120.0,
        tracing: Tracing | None = None,
        ladder: Ladder | None = None,
    ) -> AsyncIterator[Worker]:
        """A replica; it is drained in the end."""
        profile, runner, placement = Profile(4), runner or self.runner, self.placement
        factor = runner.family.vae.scale_factor

        def report(pace: Pace) -> WorkerReport:
            return report_of(name, placement, profile, factor, pace)

        worker = Worker(
            name=name,
            placement=placement,
            settings=self.settings,
            jobs=jobs or self.jobs,
            planner=self.planner,
            embeddings=EmbeddingCache(Settings().cache, self.encode, self.metrics, place="diffusion"),
            engine=Engine(runner, StepScheduler(profile), profile, self.metrics, ladder=ladder),
            results=results or self.results,
            metrics=self.metrics,
            batch=lambda: self.batch,
            report=report,
            cost_of=partial(cost_here, profile, factor),
            spool_bytes=spool_bytes,
            stall_s=lambda: stall_s,
            tracing=tracing,
            placements=self.placements,
        )
        try:
            yield worker
        finally:
            await worker.drain(GRACE_S)

    async def close(self) -> None:
        """After the workers, and after a check of every record."""
        await self.stop_sweeping()
        await self.jobs.check_integrity()
        await self.pool.close()
        await self.jobs.close()

    def a_request(self, **parameters: Any) -> ImageRequest:
        values: dict[str, Any] = {
            "model": self.model.name,
            "prompt": "a red circle",
            "width": 128,
            "height": 128,
            "num_inference_steps": 3,
            "guidance_scale": 5.0,
            "seed": 1,
        }
        return ImageRequest(**values | parameters)

    async def submit(self, job_id: str, **parameters: Any) -> None:
        await self.jobs.submit(job_id, self.a_request(**parameters))

    async def picture(self, job: Job, index: int = 0) -> Image.Image:
        return Image.open(io.BytesIO(await self.results.get(job.images[index].key))).convert("RGB")

    async def ended(self, job_id: str, within_s: float = 60.0) -> Job:
        await self.events(job_id, within_s)
        return await self.jobs.get(job_id)

    async def events(self, job_id: str, within_s: float = 60.0) -> list[JobEvent]:
        """All of them, to the job's end."""
        async with asyncio.timeout(within_s):
            return [event async for event in follow(self.jobs, job_id)]

    async def reaches(self, job_id: str, condition: Callable[[Job], bool], within_s: float = 60.0) -> Job:
        """The job once one of its events finds it so."""
        async with asyncio.timeout(within_s):
            async for _ in follow(self.jobs, job_id):
                job = await self.jobs.get(job_id)
                if condition(job):
                    return job
        raise AssertionError("the job ended before")

    def steps_made(self) -> float:
        """By all workers together."""
        return self.metrics.value("tandem_engine_steps_total")


@contextlib.asynccontextmanager
async def open_house(url: str, folder: Path, **settings: Any) -> AsyncIterator[House]:
    """A house with an empty Redis at `url`, which is closed and checked in the end."""
    house = House(url, folder, **settings)
    yield house
    await house.close()


async def until(condition: Callable[[], object], within_s: float = 60.0) -> None:
    """Of what nobody tells; the condition may be a coroutine."""
    async with asyncio.timeout(within_s):
        while True:
            found = condition()
            if await found if inspect.isawaitable(found) else found:
                return
            await asyncio.sleep(0.005)


async def restarted(server: EmbeddedRedis) -> None:
    """Started again, without stopping the event loop meanwhile."""
    await asyncio.to_thread(server.start)
