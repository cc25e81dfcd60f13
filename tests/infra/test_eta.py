"""Predictions against what really passed: one worker with a real Redis, the shipped model and its measured profile."""

import itertools
import random
import statistics
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from pydantic import SecretStr
from support.jobs import until

from serve.costs import Costs
from serve.diffusion.engine import Engine
from serve.diffusion.profile import Profile, open_profile
from serve.diffusion.runner import Runner, open_runner
from serve.diffusion.scheduler import LatentShape, StepScheduler
from serve.domain.jobs import Job, JobState
from serve.domain.orders import ImageRequest
from serve.encoders.cache import EmbeddingCache, Fetched
from serve.encoders.forward import TextTower
from serve.encoders.pool import EncoderPool
from serve.encoders.registry import Registry, register
from serve.jobs.events import follow
from serve.jobs.store import JobStore, Terms
from serve.jobs.terms import Crew, WorkerReport
from serve.models import ModelFolder, resolve
from serve.placements import Placement
from serve.prompts.plan import Planner
from serve.reports import Pace, cost_here, report_of
from serve.results.store import open_store
from serve.settings.pools import DiffusionSettings, ModelSettings
from serve.settings.stores import JobSettings, ResultSettings
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics
from serve.worker import Worker

pytestmark = pytest.mark.anyio

DIFFUSION = DiffusionSettings(device="cpu", torch_threads=1, max_batch_size=4, max_rows=8, profile_s=5)
"""Half of the images in hand make a step."""
BATCH = 4
SIZES = ((64, 64), (128, 128), (192, 128), (256, 256))
DEFAULT = (16, 16)
"""The latents of 128 x 128."""
JOBS = 24
ROUNDS = 3


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def a_mixed_order(draw: random.Random) -> dict[str, object]:
    return {"num_inference_steps": draw.choice([4, 8, 15, 25, 40]), "num_images": draw.choice([1, 1, 2])}


class WatchedProfile(Profile):
    """Keeps what steps took, and what they were expected to take when it began to watch."""

    def watch(self) -> None:
        self.full_ms: list[float] = []
        self.frozen = Profile(self.max_batch_size, self.curves(len(SIZES)))
        self.took_ms = self.expected_ms = 0.0

    def learn(self, shape: LatentShape, lanes: int, ms: float) -> None:
        self.took_ms += ms
        self.expected_ms += self.frozen.step_ms(shape, lanes)
        if lanes == self.lanes(shape):
            self.full_ms.append(ms)
        super().learn(shape, lanes, ms)


class House:
    """A job store, a folder and one worker whose profile was measured; prompts are encoded in this process."""

    def __init__(
        self, url: str, folder: Path, model: ModelFolder, registry: Registry, runner: Runner, measured: Profile
    ) -> None:
        settings = Settings(data_dir=folder)
        self.metrics = InProcessMetrics()
        self.settings = JobSettings(redis_url=SecretStr(url))
        self.jobs = JobStore(self.settings, self.metrics)
        self.costs = Costs()
        self._model = model
        self._runner = runner
        self.profile = WatchedProfile(measured.max_batch_size, measured.curves(len(SIZES)))
        self.profile.watch()
        self._folder = folder
        self._place = Placement(name="a", model=model.name, gpu_class=None, settings=DIFFUSION, max_pixels=1 << 20)
        self._planner = Planner(model, registry.sources(model.name))
        tower = TextTower.load(registry.encoders[0], "cpu")
        self._pool = EncoderPool(tower, registry.encoders[0], settings, self.metrics)

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[None]:
        """One that has reported."""
        worker = Worker(
            name="worker",
            placement=self._place,
            settings=self.settings,
            jobs=self.jobs,
            planner=self._planner,
            embeddings=EmbeddingCache(Settings().cache, self._encode, self.metrics, place="diffusion"),
            engine=Engine(self._runner, StepScheduler(self.profile), self.profile, self.metrics),
            results=open_store(ResultSettings(), self._folder),
            metrics=self.metrics,
            batch=lambda: BATCH,
            report=self._reported,
            cost_of=partial(cost_here, self.profile, self._runner.family.vae.scale_factor),
            spool_bytes=1 << 30,
            stall_s=lambda: 60.0,
        )
        try:
            await until(self._has_told)
            yield
        finally:
            await worker.drain(60)

    async def close(self) -> None:
        await self._pool.close()
        await self.jobs.close()

    def report(self) -> WorkerReport:
        """As the worker would tell it now."""
        return report_of("worker", self._place, self.profile, self._runner.family.vae.scale_factor, self.pace)

    def a_request(self, **parameters: object) -> ImageRequest:
        values = {
            "prompt": "a red circle",
            "width": 128,
            "height": 128,
            "num_inference_steps": 8,
            "guidance_scale": 5.0,
            "seed": 1,
        } | parameters
        return ImageRequest(model=self._model.name, **values)  # type: ignore[arg-type]

    async def submit(self, job_id: str, **parameters: object) -> Job:
        request = self.a_request(**parameters)
        told = self.costs.estimate(request, await self.jobs.crew(request.model))
        assert told.known
        terms = Terms(cost_ms=told.cost_ms, alone_ms=told.alone_ms, replicas=told.replicas)
        return (await self.jobs.submit(job_id, request, terms=terms)).job

    async def busy_until_it_tells(self, draw: random.Random) -> None:
        """So busy that it learns what steps take beside everything else that goes on here, until it has told so."""
        before = (await self.jobs.crew(self._model.name)).reports[0].pace
        busy: deque[Job] = deque()
        for number in itertools.count():
            busy.append(await self.submit(f"before-{number}", **a_mixed_order(draw)))
            if len(busy) > BATCH:
                await self.ended(busy.popleft().id)
            if number > 2 * BATCH and (await self.jobs.crew(self._model.name)).reports[0].pace != before:
                break
        for job in busy:
            await self.ended(job.id)

    async def ended(self, job_id: str) -> Job:
        async for _ in follow(self.jobs, job_id):
            pass
        job = await self.jobs.get(job_id)
        assert job.state is JobState.SUCCEEDED, job
        return job

    async def _has_told(self) -> bool:
        return bool((await self.jobs.crew(self._model.name)).reports)

    def _reported(self, pace: Pace) -> WorkerReport:
        self.pace = pace
        return self.report()

    async def _encode(self, units: Sequence[object]) -> list[Fetched]:
        return await self._pool.encode(units)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> ModelFolder:
    return resolve(ModelSettings(), Path())


@pytest.fixture(scope="module")
def measured(model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, Profile]:
    runner = open_runner(model, DIFFUSION)
    return runner, open_profile(runner, model, DIFFUSION, tmp_path_factory.mktemp("profile"))


@pytest.fixture(scope="module")
def registry(model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return register([model], Settings(data_dir=tmp_path_factory.mktemp("data")))


@pytest.fixture
async def house(
    redis_url: str, tmp_path: Path, model: ModelFolder, registry: Registry, measured: tuple[Runner, Profile]
) -> AsyncIterator[House]:
    house = House(redis_url, tmp_path, model, registry, *measured)
    yield house
    await house.close()


def kendall_tau(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pairs in the same order less pairs in the other, over all pairs: 1 for the same order, 0 for none."""
    pairs = [(i, j) for i in range(len(xs)) for j in range(i)]
    return sum((1 if (xs[i] - xs[j]) * (ys[i] - ys[j]) > 0 else -1) for i, j in pairs) / len(pairs)


@pytest.mark.slow
async def test_the_end_that_is_told_at_submission_is_the_end(house: House) -> None:
    """In one go: each is told an end while nothing that comes after it is known.

    What else runs on this machine makes steps slower or faster from one second to the next, which nobody can tell
    beforehand: the prediction is for steps as they were told to be, so the ends are compared in units of a full step.
    """
    draw = random.Random(1)
    async with house.worker():
        await house.busy_until_it_tells(draw)
        (report,) = (await house.jobs.crew(house.report().model)).reports
        told_ms = next(max(each.ms.items())[1] for each in report.curves if (each.height, each.width) == DEFAULT)
        house.profile.watch()
        submitted = [await house.submit(str(i), **a_mixed_order(draw)) for i in range(JOBS)]
        ended = [await house.ended(job.id) for job in submitted]
    told = [1000 * (job.eta_s or 0.0) / told_ms for job in submitted]
    real_ms = statistics.mean(house.profile.full_ms)
    real = [1000 * (job.timings.total_s or 0.0) / real_ms for job in ended]
    error = statistics.median(abs(eta - took) / took for eta, took in zip(told, real, strict=True))
    assert error <= 0.35, list(zip(told, real, strict=True))
    assert kendall_tau(told, real) >= 0.6, list(zip(told, real, strict=True))


@pytest.mark.slow
async def test_a_lone_job_takes_as_long_as_is_told(house: House) -> None:
    """Of every size, guided and not, of one image and of several, by what the replica knows just before.

    Again for steps as they were expected to be, size by size; as they are, in the middle of all sizes.
    """
    orders = [
        {"width": width, "height": height, "guidance_scale": guidance, "num_images": images}
        for width, height in SIZES
        for guidance, images in ((5.0, 1), (1.0, 1), (5.0, BATCH + 2 if width <= 128 else 2))
    ]
    told: list[list[float]] = [[] for _ in orders]
    real: list[list[float]] = [[] for _ in orders]
    plain = []
    async with house.worker():
        for turn in range(ROUNDS):
            for number, order in enumerate(orders):
                house.profile.watch()
                request, job_id = house.a_request(**order), f"{number}-{turn}"
                told[number].append(house.costs.estimate(request, Crew((house.report(),))).alone_ms / 1000)
                await house.submit(job_id, **order)
                timings = (await house.ended(job_id)).timings
                parts = (timings.batch_s, timings.steps_s, timings.decode_wait_s, timings.decode_s)
                took_s = sum(part or 0.0 for part in parts)
                real[number].append(took_s * house.profile.expected_ms / house.profile.took_ms)
                plain.append(told[number][-1] / took_s)
    assert statistics.median(plain) == pytest.approx(1.0, rel=0.5)
    for order, predicted, took in zip(orders, told, real, strict=True):
        assert statistics.median(predicted) == pytest.approx(statistics.median(took), rel=0.5), (order, predicted, took)
