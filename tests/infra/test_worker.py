"""One worker with a real Redis, the shipped model and a folder; only Ray between it and the encoders is missing."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pydantic import SecretStr

from serve.diffusion.engine import Engine
from serve.diffusion.profile import Profile
from serve.diffusion.runner import Runner, open_runner
from serve.diffusion.scheduler import Row, StepScheduler
from serve.domain import EncodeUnit, ImageRequest, Job, JobState, Sign, Tier
from serve.embedded import EmbeddedRedis
from serve.encoders.cache import EmbeddingCache, Fetched
from serve.encoders.forward import TextTower
from serve.encoders.pool import EncoderPool
from serve.encoders.registry import Registry, register
from serve.errors import BackendUnavailable, OutOfMemory
from serve.jobs.events import follow
from serve.jobs.store import JobStore
from serve.jobs.sweeper import sweep
from serve.models import ModelFolder, resolve
from serve.orders import NewImage
from serve.placements import Fleet, Placement
from serve.prompts.plan import Planner
from serve.results.encode import read_parameters
from serve.results.store import open_store
from serve.service import ImageService
from serve.settings import DiffusionSettings, JobSettings, LimitSettings, ModelSettings, ResultSettings, Settings
from serve.shapes.draw import draw, sample_scene
from serve.telemetry.metrics import InProcessMetrics
from serve.wants import LEFT_TO_OTHERS_S
from serve.worker import Worker

pytestmark = pytest.mark.anyio

LONG = 150


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model() -> ModelFolder:
    return resolve(ModelSettings(), Path())


def a_runner(model: ModelFolder) -> Runner:
    return open_runner(model, DiffusionSettings(device="cpu", torch_threads=1))


@pytest.fixture(scope="module")
def runner(model: ModelFolder) -> Runner:
    return a_runner(model)


@pytest.fixture(scope="module")
def registry(model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return register([model], Settings(data_dir=tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def tower(registry: Registry) -> TextTower:
    return TextTower.load(registry.encoders[0], "cpu")


def a_placement(model: str) -> Placement:
    settings = DiffusionSettings(max_batch_size=4)
    return Placement(name="a card", model=model, gpu_class=None, settings=settings, max_pixels=1 << 20)


class House:
    """A job store, a folder, and workers that share them."""

    def __init__(
        self,
        url: str,
        folder: Path,
        model: ModelFolder,
        registry: Registry,
        runner: Runner,
        tower: TextTower,
        lease_s: float = 0.6,
    ) -> None:
        self.settings = JobSettings(redis_url=SecretStr(url), lease_s=lease_s)
        self.metrics = InProcessMetrics()
        self.jobs = JobStore(self.settings, self.metrics)
        self.folder = folder
        self.model = model
        self.runner = runner
        self.placement = a_placement(model.name)
        self.batch = 4
        self.results = open_store(ResultSettings(), folder)
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
    async def worker(self, name: str = "worker", runner: Runner | None = None) -> AsyncIterator[Worker]:
        worker = Worker(
            name=name,
            placement=self.placement,
            settings=self.settings,
            jobs=self.jobs,
            planner=self.planner,
            embeddings=EmbeddingCache(Settings().cache, self.encode, self.metrics, place="diffusion"),
            engine=Engine(runner or self.runner, StepScheduler(profile := Profile(4)), profile, self.metrics),
            results=self.results,
            metrics=self.metrics,
            batch=lambda: self.batch,
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
        values = {
            "prompt": "a red circle",
            "width": 128,
            "height": 128,
            "num_inference_steps": 3,
            "guidance_scale": 5.0,
            "seed": 1,
        } | parameters
        request = ImageRequest(model=self.model.name, **values)  # type: ignore[arg-type]
        await self.jobs.submit(job_id, request)

    async def picture(self, job: Job, index: int = 0) -> Image.Image:
        assert job.state is JobState.SUCCEEDED, job
        return Image.open(io.BytesIO(await self.results.get(job.images[index].key))).convert("RGB")

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
async def calm_house(
    redis_url: str, tmp_path: Path, model: ModelFolder, registry: Registry, runner: Runner, tower: TextTower
) -> AsyncIterator[House]:
    """Leases are so long that no heartbeat and no sweep helps."""
    house = House(redis_url, tmp_path, model, registry, runner, tower, lease_s=600)
    yield house
    await house.close()


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


async def test_a_drawn_job_leaves_a_line_in_the_log(house: House, caplog: pytest.LogCaptureFixture) -> None:
    await house.submit("logged", num_images=2)
    with caplog.at_level("INFO", "serve.worker"):
        async with house.worker("a"):
            await house.ended("logged")
    (line,) = (record for record in caplog.records if record.message == "job drawn")
    told = vars(line)
    assert (told["job"], told["size"], told["steps"], told["images"]) == ("logged", "128x128", 3, 2)
    assert all(told[f"{stage}_ms"] >= 0 for stage in ("text", "denoise", "decode", "store"))
    assert "a red circle" not in str(told)


async def test_cancel_reaches_a_running_job(house: House) -> None:
    async with house.worker():
        await house.submit("a", num_inference_steps=LONG, num_images=4)
        await house.reaches("a", lambda job: job.step > 0)
        await house.jobs.cancel("a")
        job = await house.ended("a")
    assert job.state is JobState.CANCELLED
    assert job.step < LONG
    assert not (house.folder / "images" / "a").exists()


async def test_a_cancelled_job_frees_its_rows_within_one_step(calm_house: House) -> None:
    house = calm_house
    async with house.worker() as worker:
        # Steps of a second or so: one that the cancel did not reach would be a step too many.
        await house.submit("a", num_inference_steps=LONG, num_images=4, width=512, height=512)
        await house.reaches("a", lambda job: job.step > 0)
        await house.jobs.cancel("a")
        made = house.metrics.value("tandem_engine_steps_total")
        job = await asyncio.wait_for(house.ended("a"), 60)
        assert job.state is JobState.CANCELLED
        await house.submit("b", num_inference_steps=2)
        assert (await house.ended("b")).state is JobState.SUCCEEDED
        assert worker.rows <= 1
        assert house.metrics.value("tandem_engine_steps_total") - made <= 1 + 2


async def test_a_short_job_behind_a_full_batch_waits_for_others_and_then_finishes_first(house: House) -> None:
    async with house.worker():
        await house.submit("long", num_inference_steps=LONG, num_images=4)
        await house.reaches("long", lambda job: job.step > 0)
        await house.submit("short", num_inference_steps=4)
        short = await house.ended("short")
        assert (await house.jobs.get("long")).state is JobState.RUNNING
        await house.jobs.cancel("long")
    assert short.state is JobState.SUCCEEDED
    assert short.timings.queued_s is not None
    assert LEFT_TO_OTHERS_S <= short.timings.queued_s < 5


@pytest.mark.parametrize("batch", [4, 1])
async def test_a_full_replica_leaves_work_to_an_idle_one(house: House, batch: int) -> None:
    house.batch = batch  # as the profile has it: no more may pay at this size
    async with house.worker("full"):
        await house.submit("long", num_inference_steps=LONG, num_images=batch)
        await house.reaches("long", lambda job: job.step > 0)
        async with house.worker("idle", a_runner(house.model)):
            await house.submit("short", num_inference_steps=4)
            await house.ended("short")
            assert await house.jobs._redis.hget("tandem:job:short", "worker") == b"idle"
        await house.jobs.cancel("long")


def a_scene() -> Image.Image:
    """A picture of the kind that the shipped model draws."""
    return Image.fromarray(draw(sample_scene(np.random.default_rng(3))))


def a_mask(side: int = 128) -> Image.Image:
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).rectangle((0, 0, side // 2, side), fill=255)
    return mask


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def apart(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())


async def test_a_job_that_starts_from_an_image_stays_close_to_it(house: House) -> None:
    await house.results.put("near/image.png", png(a_scene()), "image/png")
    order = {"image": "near/image.png", "num_inference_steps": 10, "prompt": "a green square on a yellow background"}
    async with house.worker():
        await house.submit("near", strength=0.2, **order)
        await house.submit("far", strength=0.9, **order)
        near, far = [await house.ended(job_id) for job_id in ("near", "far")]
    assert (near.state, near.step, near.steps, far.steps) == (JobState.SUCCEEDED, 2, 2, 9)
    pictures = [await house.picture(job) for job in (near, far)]
    distances = [apart(picture, a_scene()) for picture in pictures]
    assert distances[0] < 12 < 20 < distances[1]


async def test_a_masked_job_repaints_what_is_white(house: House) -> None:
    await house.results.put("a/image.png", png(a_scene()), "image/png")
    await house.results.put("a/mask.png", png(a_mask()), "image/png")
    async with house.worker():
        await house.submit(
            "a", image="a/image.png", mask="a/mask.png", strength=1.0, prompt="a green square on a yellow background"
        )
        job = await house.ended("a")
    picture = await house.picture(job)
    kept, painted = (80, 0, 128, 128), (0, 0, 48, 128)
    assert apart(picture.crop(kept), a_scene().crop(kept)) < 7
    assert apart(picture.crop(painted), a_scene().crop(painted)) > 14


@pytest.mark.parametrize("missing", ["image", "mask"])
async def test_a_job_whose_input_is_gone_fails_and_does_not_blame_the_client(house: House, missing: str) -> None:
    """Another attempt may be made where the file is: without a shared store, on another node."""
    kept = "mask" if missing == "image" else "image"
    await house.results.put(f"a/{kept}.png", png(a_mask().convert("RGB")), "image/png")
    async with house.worker():
        await house.submit("a", image="a/image.png", mask="a/mask.png", strength=0.5)
        job = await house.ended("a")
    assert job.error is not None
    assert (job.state, job.attempt, job.error.code) == (JobState.FAILED, 3, "generation_failed")
    assert job.error.message.startswith(f"the server no longer has the {missing}")


async def test_an_image_is_stored_in_the_form_that_was_ordered(house: House) -> None:
    async with house.worker():
        await house.submit("a", output_format="jpeg", output_compression=80, num_images=2)
        await house.submit("b", bit_depth=16)
        job, deep = [await house.ended(job_id) for job_id in ("a", "b")]
    assert [(image.key, image.content_type) for image in job.images] == [
        ("a/0.jpg", "image/jpeg"),
        ("a/1.jpg", "image/jpeg"),
    ]
    for image in job.images:
        data = await house.results.get(image.key)
        with Image.open(io.BytesIO(data)) as picture:
            assert (picture.format, picture.size) == ("JPEG", (image.width, image.height))
        assert image.bytes == len(data)
    (image,) = deep.images
    assert (image.key, image.content_type, image.width, image.height) == ("b/0.png", "image/png", 128, 128)
    assert (await house.results.get(image.key))[24] == 16  # bits of a sample, as the file's header has it


async def test_previews_come_with_the_events(house: House) -> None:
    async with house.worker():
        await house.submit("a", num_inference_steps=LONG, num_images=2, preview_every=2)
        shown = [event async for event in follow(house.jobs, "a") if event.preview is not None]
        job = await house.jobs.get("a")
    assert job.state is JobState.SUCCEEDED
    assert {event.index for event in shown} == {0, 1}
    assert {event.state for event in shown} == {JobState.RUNNING}
    steps = [event.step for event in shown if event.index == 0]
    assert steps == sorted(set(steps))
    assert all(step % 2 == 0 for step in steps)
    with Image.open(io.BytesIO(shown[-1].preview or b"")) as picture:
        assert (picture.format, picture.width >= 16) == ("JPEG", True)


async def test_an_approximate_image_is_labelled(house: House) -> None:
    async with house.worker():
        await house.submit("a", num_inference_steps=20, step_cache=1.0)
        await house.submit("b")
        labelled, exact = [await house.ended(job_id) for job_id in ("a", "b")]
    assert (labelled.approximate, exact.approximate) == (("step_cache",), ())
    found = [read_parameters(await house.results.get(job.images[0].key)) for job in (labelled, exact)]
    assert [each.get("approximate") for each in found] == [["step_cache"], None]


async def test_a_device_that_is_full_is_tried_again_and_then_told(house: House) -> None:
    class Full(Runner):
        def step(self, rows: Sequence[Row]) -> dict[Row, Exception]:
            raise OutOfMemory("the device had not enough memory")

    async with house.worker(runner=Full(house.runner.family)):
        await house.submit("a", num_images=2)
        job = await house.ended("a")
    assert job.error is not None
    assert (job.state, job.attempt, job.error.code) == (JobState.FAILED, 3, "out_of_memory")


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
        models={house.model.name: house.model},
        fleet=Fleet((house.placement,)),
        limits=LimitSettings(),
        jobs=house.jobs,
        planners={house.model.name: house.planner},
        prepare=prepare,
        results=house.results,
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
