"""Whatever fails around a worker, each of its jobs ends once."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from support.house import GatedRunner, House, a_runner, open_house, restarted, until

from serve.attempt import retried
from serve.diffusion.runner import Latents, Runner
from serve.diffusion.scheduler import Row
from serve.domain.jobs import JobState
from serve.embedded import EmbeddedRedis
from serve.errors import (
    BackendUnavailable,
    ClientError,
    DeviceLost,
    GenerationFailed,
    InvalidRequest,
    NotFinite,
    OperatorError,
    OutOfMemory,
    QueueFull,
)
from serve.results.keys import manifest_key
from serve.results.local import LocalStore
from serve.results.store import Stored

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def house(redis_url: str, tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(redis_url, tmp_path) as house:
        yield house


@pytest.fixture
async def fragile_house(jobs_redis: EmbeddedRedis, tmp_path: Path) -> AsyncIterator[House]:
    """Its job Redis is durable, and the test's own: it may be killed and restarted."""
    async with open_house(jobs_redis.url, tmp_path) as house:
        yield house


class Failing(Runner):
    """A device that fails at every step, or at the decoding of every image."""

    def __init__(self, runner: Runner, step: Exception | None = None, decode: Exception | None = None) -> None:
        super().__init__(runner.family)
        self.errors = step, decode

    def step(self, rows: Sequence[Row], most: int | None = None) -> dict[Row, Exception]:
        if self.errors[0] is not None:
            raise self.errors[0]
        return super().step(rows, most)

    def decode(self, latents: Latents, side: int | None = None) -> object:
        if self.errors[1] is not None:
            raise self.errors[1]
        return super().decode(latents, side)


class Blocked:
    """A folder that can't be written, until it can."""

    def __init__(self, house: House) -> None:
        self._file = house.folder / "images"
        self._file.write_text("a file where the folder should be")

    def clear(self) -> None:
        self._file.unlink()


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (InvalidRequest("a field is wrong"), False),
        (ClientError("the client is wrong"), False),
        (NotFinite("not a number"), False),
        (OutOfMemory("no memory"), True),
        (DeviceLost("no device"), True),
        (GenerationFailed("it broke"), True),
        (BackendUnavailable("away"), True),
        (QueueFull("full"), True),
        (OperatorError("a setting is wrong"), True),
        (ValueError("nobody thought of it"), True),
    ],
)
async def test_what_may_be_different_next_time_is_tried_again(error: Exception, again: bool) -> None:
    assert retried(error) is again


async def test_a_device_that_is_full_is_tried_again_and_then_told(house: House) -> None:
    full = OutOfMemory("the device had not enough memory")
    async with house.worker(runner=Failing(house.runner, step=full)):
        await house.submit("a", num_images=2)
        job = await house.ended("a")
    assert job.error is not None
    assert (job.state, job.attempt, job.error.code) == (JobState.FAILED, 3, "out_of_memory")


async def test_an_image_that_is_not_a_number_is_not_tried_again(house: House) -> None:
    black = NotFinite("the image came out as not-a-number; try other parameters")
    async with house.worker(runner=Failing(house.runner, decode=black)):
        await house.submit("a")
        job = await house.ended("a")
    assert job.error is not None
    assert (job.state, job.attempt, job.error.code) == (JobState.FAILED, 1, "not_finite")


async def test_another_attempt_waits_for_a_while(redis_url: str, tmp_path: Path) -> None:
    async with open_house(redis_url, tmp_path, retry_backoff_s=600.0) as house:
        async with house.worker(runner=Failing(house.runner, step=OutOfMemory("no memory"))) as worker:
            await house.submit("a")
            await house.reaches("a", lambda job: job.state is JobState.QUEUED and job.attempt == 1)
            # The job is at the head of the queue, and this one is taken past it.
            await house.submit("b", num_images=2)
            await house.reaches("b", lambda job: job.attempt == 1)
            assert worker.ailment is None
        jobs = [await house.jobs.get(job_id) for job_id in ("a", "b")]
    assert [(job.state, job.attempt, job.position) for job in jobs] == [
        (JobState.QUEUED, 1, 1),
        (JobState.QUEUED, 1, 2),
    ]


async def test_a_lost_device_costs_an_attempt_and_the_replica(house: House) -> None:
    """Which claims nothing more: it would fail the whole queue. Another finishes what it had."""
    async with house.worker("broken", Failing(house.runner, step=DeviceLost("the device failed"))) as worker:
        await house.submit("a")
        await house.reaches("a", lambda job: job.state is JobState.QUEUED and job.attempt == 1)
        await until(lambda: worker.ailment == "the step loop has ended")
        async with house.worker("sound", a_runner(house.model)):
            job = await house.ended("a")
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)


@pytest.mark.parametrize("missing", ["image", "mask"])
async def test_a_job_whose_input_is_gone_fails_and_does_not_blame_the_client(house: House, missing: str) -> None:
    """Another attempt may be made where the file is: without a shared store, on another node."""
    keys = {field: f"a/{field}-00000000.png" for field in ("image", "mask")}
    async with house.worker():
        await house.submit("drawn")
        drawn = await house.ended("drawn")
        kept = "mask" if missing == "image" else "image"
        await house.results.put(keys[kept], await house.results.get(drawn.images[0].key), "image/png")
        await house.submit("a", **keys, strength=0.5)
        job = await house.ended("a")
    assert job.error is not None
    assert (job.state, job.attempt, job.error.code) == (JobState.FAILED, 3, "generation_failed")
    assert job.error.message.startswith(f"the server no longer has the {missing}")


async def test_a_job_waits_for_an_encoder_that_is_away(house: House) -> None:
    house.encoder_away = True
    async with house.worker():
        await house.submit("a")
        await house.reaches("a", lambda job: job.state is JobState.ENCODING)
        house.encoder_away = False
        job = await house.ended("a")
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)


async def test_a_cancelled_job_does_not_wait_for_a_hung_encoder(house: House) -> None:
    house.encoder_hangs.set()
    async with house.worker() as worker:
        await house.submit("a")
        await house.reaches("a", lambda job: job.state is JobState.ENCODING)
        await house.jobs.cancel("a")
        assert (await house.ended("a")).state is JobState.CANCELLED
        await until(lambda: not worker.rows)


async def test_a_job_waits_for_a_folder_that_can_not_be_written(house: House) -> None:
    blocked = Blocked(house)
    async with house.worker():
        await house.submit("a")
        await house.reaches("a", lambda job: job.state is JobState.STORING)
        blocked.clear()
        job = await house.ended("a")
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)


async def test_a_replica_draws_on_while_its_images_can_not_be_stored(house: House) -> None:
    """Twelve images, of which four are in hand at most; their leases are renewed all the while."""
    house.placement = house.a_placement(max_rows=4)
    blocked = Blocked(house)
    async with house.worker() as worker:
        for number in range(6):
            await house.submit(str(number), num_images=2, seed=number)
        for number in range(6):
            await house.reaches(str(number), lambda job: job.state is JobState.STORING)
        await until(lambda: worker.rows == 0)
        assert house.metrics.value("tandem_spool_bytes") > 0
        blocked.clear()
        jobs = [await house.ended(str(number)) for number in range(6)]
        await until(lambda: house.metrics.value("tandem_spool_bytes") == 0)
    assert {(job.state, job.attempt, len(job.images)) for job in jobs} == {(JobState.SUCCEEDED, 1, 2)}


async def test_a_replica_whose_spool_is_full_claims_no_more(house: House) -> None:
    house.placement = house.a_placement(max_rows=4)
    blocked = Blocked(house)
    async with house.worker(spool_bytes=1) as worker:
        for number in range(6):
            await house.submit(str(number), num_images=2, seed=number)
        stored = await asyncio.gather(
            *(house.reaches(str(number), lambda job: job.state is JobState.STORING) for number in range(2))
        )
        assert {job.attempt for job in stored} == {1}
        assert worker.rows == 4
        assert [(await house.jobs.get(str(number))).state for number in range(2, 6)] == [JobState.QUEUED] * 4
        blocked.clear()
        jobs = [await house.ended(str(number)) for number in range(6)]
    assert {(job.state, job.attempt) for job in jobs} == {(JobState.SUCCEEDED, 1)}


async def test_a_run_outlives_the_job_store(fragile_house: House, jobs_redis: EmbeddedRedis) -> None:
    """It is drawn while the job Redis is away, for longer than its lease, and settled when that is back. Nobody reaps
    meanwhile: what a sweep leaves to such runs is a matter of its own tests."""
    house = fragile_house
    await house.stop_sweeping()
    runner = GatedRunner(house.runner, free=1)
    async with house.worker(runner=runner):
        await house.submit("a", num_images=4)
        await house.reaches("a", lambda job: job.step == 1)
        assert runner.reached.wait(60)
        lapsed_at = asyncio.get_running_loop().time() + 2 * house.settings.lease_s
        jobs_redis.kill()
        runner.gate.set()
        with pytest.raises(BackendUnavailable):
            await house.submit("b")
        await until(lambda: house.steps_made() == 3 and asyncio.get_running_loop().time() > lapsed_at)
        await restarted(jobs_redis)
        job = await house.ended("a")
    assert (job.state, job.attempt, len(job.images)) == (JobState.SUCCEEDED, 1, 4)


class Deadly(LocalStore):
    """As soon as a job's manifest is there, its worker can no longer reach the job store."""

    def __init__(self, folder: Path, redis: EmbeddedRedis) -> None:
        super().__init__(folder)
        self._redis = redis
        self.died = asyncio.Event()

    async def put(self, key: str, data: bytes, content_type: str) -> Stored:
        stored = await super().put(key, data, content_type)
        if key == manifest_key("a"):
            self._redis.kill()
            self.died.set()
        return stored


async def test_what_a_lost_worker_had_stored_is_not_drawn_again(
    fragile_house: House, jobs_redis: EmbeddedRedis
) -> None:
    house = fragile_house
    results = Deadly(house.folder / "images", jobs_redis)
    async with house.worker("lost", results=results) as worker:
        await house.submit("a", num_images=2, step_cache=0.0)
        await results.died.wait()
        made = house.steps_made()
        await worker.abandon()
    files = sorted(path.name for path in (house.folder / "images" / "a").iterdir())
    await restarted(jobs_redis)
    async with house.worker("heir"):
        job = await house.ended("a")
    assert (job.state, job.attempt, len(job.images)) == (JobState.SUCCEEDED, 2, 2)
    assert house.steps_made() == made
    assert sorted(path.name for path in (house.folder / "images" / "a").iterdir()) == files


async def test_a_replica_reports_itself_also_after_the_store_was_away(
    fragile_house: House,
    jobs_redis: EmbeddedRedis,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    house = fragile_house
    monkeypatch.setattr("serve.worker.REPORT_S", 0.05)

    async def reported() -> bool:
        return [report.name for report in (await house.jobs.crew(house.model.name)).reports] == ["early"]

    jobs_redis.kill()
    async with house.worker("early") as worker:
        await until(lambda: "reporting" in caplog.text)
        await restarted(jobs_redis)
        await until(reported)
        assert worker.ailment is None
