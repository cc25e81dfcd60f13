"""One worker with a real Redis, the shipped model and a folder; only Ray between it and the encoders is missing."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr

from serve.diffusion.engine import Engine
from serve.diffusion.runner import Runner, open_runner
from serve.diffusion.scheduler import StepScheduler
from serve.domain import EncodeUnit, ImageRequest, Job, JobState, Sign, Tier
from serve.embedded import EmbeddedRedis
from serve.encoders.cache import EmbeddingCache, Fetched
from serve.encoders.forward import TextTower
from serve.encoders.pool import EncoderPool
from serve.encoders.registry import Registry, register
from serve.errors import BackendUnavailable
from serve.jobs.events import follow
from serve.jobs.store import JobStore
from serve.jobs.sweeper import sweep
from serve.models import ModelFolder, resolve
from serve.orders import NewImage
from serve.prompts.plan import Planner
from serve.results.png import read_parameters
from serve.results.store import open_store
from serve.service import ImageService
from serve.settings import DiffusionSettings, JobSettings, LimitSettings, ModelSettings, ResultSettings, Settings
from serve.telemetry.metrics import InProcessMetrics
from serve.worker import Worker

pytestmark = pytest.mark.anyio

LONG = 150


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model() -> ModelFolder:
    return resolve(ModelSettings(), Path())


@pytest.fixture(scope="module")
def runner(model: ModelFolder) -> Runner:
    return open_runner(model, DiffusionSettings(device="cpu", torch_threads=1))


@pytest.fixture(scope="module")
def registry(model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return register([model], Settings(data_dir=tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def tower(registry: Registry) -> TextTower:
    return TextTower.load(registry.encoders[0], "cpu")


class House:
    """A job store, a folder, and workers that share them."""

    def __init__(
        self, url: str, folder: Path, model: ModelFolder, registry: Registry, runner: Runner, tower: TextTower
    ) -> None:
        self.settings = JobSettings(redis_url=SecretStr(url), lease_s=0.6)
        self.metrics = InProcessMetrics()
        self.jobs = JobStore(self.settings, self.metrics)
        self.folder = folder
        self.model = model
        self.runner = runner
        self.planner = Planner(model, registry.sources(model.name))
        self.pool = EncoderPool(tower, registry.encoders[0], Settings(), self.metrics)
        self.encoder_away = False
        self.encoder_hangs = asyncio.Event()
        self.sweeping = asyncio.create_task(sweep(self.jobs, self.settings.lease_s, interval_s=0.1))

    async def encode(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
        if self.encoder_hangs.is_set():
            await asyncio.Event().wait()
        if self.encoder_away:
            raise BackendUnavailable("the encoder pool does not answer")
        return await self.pool.encode(units)

    @asynccontextmanager
    async def worker(self, name: str = "worker") -> AsyncIterator[Worker]:
        worker = Worker(
            name=name,
            model=self.model.name,
            max_rows=4,
            settings=self.settings,
            jobs=self.jobs,
            planner=self.planner,
            embeddings=EmbeddingCache(Settings().cache, self.encode, self.metrics, place="diffusion"),
            engine=Engine(self.runner, StepScheduler(4), self.metrics),
            results=open_store(ResultSettings(), self.folder),
            metrics=self.metrics,
        )
        try:
            yield worker
        finally:
            await worker.drain()

    async def close(self) -> None:
        self.sweeping.cancel()
        await self.jobs.check_integrity()
        await self.pool.close()
        await self.jobs.close()

    async def submit(self, job_id: str, **parameters: object) -> None:
        values = {"width": 128, "height": 128, "num_inference_steps": 3, "guidance_scale": 5.0, "seed": 1} | parameters
        request = ImageRequest(model=self.model.name, prompt="a red circle", **values)  # type: ignore[arg-type]
        await self.jobs.submit(job_id, request)

    async def ended(self, job_id: str) -> Job:
        async for _ in follow(self.jobs, job_id):
            pass
        return await self.jobs.get(job_id)

    async def reaches(self, job_id: str, condition: Callable[[Job], bool]) -> Job:
        """The job once one of its events finds it so."""
        async for _ in follow(self.jobs, job_id):
            job = await self.jobs.get(job_id)
            if condition(job):
                return job
        raise AssertionError("the job ended before")


@pytest.fixture
async def house(
    redis_url: str, tmp_path: Path, model: ModelFolder, registry: Registry, runner: Runner, tower: TextTower
) -> AsyncIterator[House]:
    house = House(redis_url, tmp_path, model, registry, runner, tower)
    yield house
    await house.close()


async def test_a_job_becomes_images_with_their_parameters(house: House) -> None:
    async with house.worker():
        await house.submit("a", num_images=2)
        job = await house.ended("a")
    assert job.state is JobState.SUCCEEDED
    assert job.cache is not None
    assert job.cache.encoded == 2
    signs = [house.metrics.value("tandem_text_units_total", tier="encoded", sign=sign) for sign in Sign]
    assert signs == [1, 0, 1]  # the prompt; the empty negative prompt
    assert [image.seed for image in job.images] == [1, 2]
    data = (house.folder / "images" / job.images[1].key).read_bytes()
    assert read_parameters(data)["seed"] == 2
    assert job.timings.total_s is not None


async def test_cancel_reaches_a_running_job(house: House) -> None:
    async with house.worker():
        await house.submit("a", num_inference_steps=LONG, num_images=4)
        await house.reaches("a", lambda job: job.step > 0)
        await house.jobs.cancel("a")
        job = await house.ended("a")
    assert job.state is JobState.CANCELLED
    assert job.step < LONG
    assert not (house.folder / "images" / "a").exists()


async def test_text_that_another_version_had_encoded_ahead_is_not_counted(house: House) -> None:
    """During a rollout, the ingress may have an encoder whose units are not this replica's."""
    await house.submit("a")
    await house.jobs.note_ahead("a", {"a unit of another encoder": Tier.REDIS})
    async with house.worker():
        job = await house.ended("a")
    assert job.state is JobState.SUCCEEDED
    assert [house.metrics.value("tandem_text_units_total", tier=tier) for tier in ("encoded", "redis")] == [2, 0]


async def test_a_cancelled_job_s_text_is_not_encoded_ahead(house: House) -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def prepare(units: Sequence[EncodeUnit]) -> Sequence[Tier]:
        asked.set()
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            left.set()

    service = ImageService(
        model=house.model,
        limits=LimitSettings(),
        jobs=house.jobs,
        planner=house.planner,
        prepare=prepare,
        results=open_store(ResultSettings(), house.folder),
        pools={},
        metrics=house.metrics,
    )
    job = await service.submit(NewImage(prompt="a red circle"))
    await asked.wait()
    assert (await service.cancel(job.id)).state is JobState.CANCELLED
    await asyncio.wait_for(left.wait(), 10)
    await service.close()


async def test_a_job_waits_for_an_encoder_that_is_away(house: House) -> None:
    house.encoder_away = True
    async with house.worker():
        await house.submit("a")
        await house.reaches("a", lambda job: job.state is JobState.RUNNING)
        house.encoder_away = False
        job = await house.ended("a")
    assert job.state is JobState.SUCCEEDED
    assert job.attempt == 1


async def test_a_job_waits_for_a_folder_that_can_not_be_written(house: House) -> None:
    blocked = house.folder / "images"
    blocked.write_text("a file where the folder should be")
    async with house.worker():
        await house.submit("a")
        await house.reaches("a", lambda job: job.step == job.steps)
        blocked.unlink()
        job = await house.ended("a")
    assert job.state is JobState.SUCCEEDED
    assert job.attempt == 1


async def test_a_run_outlives_the_job_store(
    jobs_redis: EmbeddedRedis,
    tmp_path: Path,
    model: ModelFolder,
    registry: Registry,
    runner: Runner,
    tower: TextTower,
) -> None:
    house = House(jobs_redis.url, tmp_path, model, registry, runner, tower)
    async with house.worker():
        await house.submit("a", num_inference_steps=40, num_images=4)
        await house.reaches("a", lambda job: job.step > 0)
        jobs_redis.kill()
        with pytest.raises(BackendUnavailable):
            await house.submit("b")
        gone_at = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < gone_at + 2 * house.settings.lease_s:
            with pytest.raises(BackendUnavailable):
                await house.jobs.ping()
        jobs_redis.start()
        job = await house.ended("a")
    assert job.state is JobState.SUCCEEDED
    assert job.attempt == 1
    assert len(job.images) == 4
    await house.close()


async def test_drain_finishes_what_is_in_hand_and_claims_no_more(house: House) -> None:
    async with house.worker() as worker:
        await house.submit("held", num_inference_steps=20, num_images=4)
        await house.reaches("held", lambda job: job.step > 0)
        await house.submit("waiting")
        await worker.drain()
        assert (await house.jobs.get("held")).state is JobState.SUCCEEDED
        assert (await house.jobs.get("waiting")).state is JobState.QUEUED
    async with house.worker("next"):
        assert (await house.ended("waiting")).state is JobState.SUCCEEDED


async def test_drain_gives_back_what_waits_for_its_text(house: House) -> None:
    house.encoder_away = True
    async with house.worker() as worker:
        await house.submit("a")
        await house.reaches("a", lambda job: job.state is JobState.RUNNING)
        await worker.drain()
        job = await house.jobs.get("a")
    assert job.state is JobState.QUEUED
    assert job.attempt == 0
    house.encoder_away = False
    async with house.worker("next"):
        assert (await house.ended("a")).attempt == 1


async def test_a_cancelled_job_does_not_wait_for_a_hung_encoder(house: House) -> None:
    house.encoder_hangs.set()
    async with house.worker() as worker:
        await house.submit("a")
        await house.reaches("a", lambda job: job.state is JobState.RUNNING)
        await house.jobs.cancel("a")
        assert (await house.ended("a")).state is JobState.CANCELLED
        while worker.rows:
            await asyncio.wait([asyncio.create_task(house.jobs.ping())])


async def test_drain_does_not_wait_for_a_hung_encoder(house: House) -> None:
    house.encoder_hangs.set()
    async with house.worker() as worker:
        await house.submit("a")
        await house.reaches("a", lambda job: job.state is JobState.RUNNING)
        await asyncio.wait_for(worker.drain(), 10)
        assert (await house.jobs.get("a")).state is JobState.QUEUED


async def test_many_jobs_all_end_well(house: House) -> None:
    async with house.worker("one"):
        for number in range(12):
            await house.submit(str(number), num_inference_steps=2 + number % 5, seed=number)
        jobs = await asyncio.gather(*(house.ended(str(number)) for number in range(12)))
    assert {job.state for job in jobs} == {JobState.SUCCEEDED}
    assert house.metrics.value("tandem_jobs_total", state="succeeded") == 12
