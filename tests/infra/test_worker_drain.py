"""A worker that is told to stop finishes what it can, and gives back the rest at once."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.house import GRACE_S, LONG, GatedRunner, House, a_runner, open_house, restarted, until

from serve.domain.jobs import JobState
from serve.embedded import EmbeddedRedis
from serve.jobs.store import Claim, JobStore
from serve.jobs.terms import Crew
from serve.worker import RELEASE_S

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def house(redis_url: str, tmp_path: Path) -> AsyncIterator[House]:
    """Leases are so long that none runs out: what goes back to the queue was given back."""
    async with open_house(redis_url, tmp_path, lease_s=600.0) as house:
        yield house


async def test_drain_finishes_what_is_in_hand_and_claims_no_more(house: House) -> None:
    async with house.worker() as worker:
        await house.submit("held", num_inference_steps=20, num_images=4)
        await house.reaches("held", lambda job: job.step > 0)
        await house.submit("waiting")
        await worker.drain(GRACE_S)
        assert (await house.jobs.get("held")).state is JobState.SUCCEEDED
        assert (await house.jobs.get("waiting")).state is JobState.QUEUED
    async with house.worker("next"):
        assert (await house.ended("waiting")).state is JobState.SUCCEEDED


async def test_who_has_left_is_counted_on_no_more_and_what_it_told_is_kept(house: House) -> None:
    async def crew() -> Crew:
        house.jobs._heard_at = float("-inf")
        return await house.jobs.crew(worker_model)

    async with house.worker() as worker:
        await house.submit("a")
        worker_model = (await house.ended("a")).request.model

        async def reported() -> bool:
            return bool((await crew()).reports)

        await until(reported)
        await worker.drain(GRACE_S)
        assert (await crew()).reports == ()
        (told,) = (await crew()).asleep
        assert told.curves


async def test_drain_gives_back_what_waits_for_its_text(house: House) -> None:
    house.encoder_away = True
    async with house.worker() as worker:
        await house.submit("a")
        await house.reaches("a", lambda job: job.state is JobState.ENCODING)
        await worker.drain(GRACE_S)
        job = await house.jobs.get("a")
    assert (job.state, job.attempt) == (JobState.QUEUED, 0)
    house.encoder_away = False
    async with house.worker("next"):
        assert (await house.ended("a")).attempt == 1


async def test_drain_does_not_wait_for_a_hung_encoder(house: House) -> None:
    house.encoder_hangs.set()
    async with house.worker() as worker:
        await house.submit("a")
        await house.reaches("a", lambda job: job.state is JobState.ENCODING)
        async with asyncio.timeout(10):
            await worker.drain(GRACE_S)
        assert (await house.jobs.get("a")).state is JobState.QUEUED


async def test_what_is_not_finished_within_the_grace_is_another_worker_s_at_once(house: House) -> None:
    """It is released, not left to its lease, and the attempt does not count."""
    async with house.worker() as worker:
        await house.submit("a", num_inference_steps=LONG, num_images=4)
        await house.reaches("a", lambda job: job.step > 0)
        await worker.drain(0.0)
        job = await house.jobs.get("a")
        assert (job.state, job.attempt, worker.rows) == (JobState.QUEUED, 0, 0)
        assert job.step < LONG
    async with house.worker("next"):
        job = await house.reaches("a", lambda job: job.step > 0)
        assert job.attempt == 1
        await house.jobs.cancel("a")


async def test_a_cancelled_job_is_not_given_back(house: House) -> None:
    runner = GatedRunner(house.runner)
    async with house.worker(runner=runner) as worker:
        await house.submit("a")
        assert await asyncio.to_thread(runner.reached.wait, 60)
        await house.jobs.cancel("a")
        leaving = asyncio.create_task(worker.drain(0.0))
        job = await house.ended("a")
        runner.gate.set()
        await leaving
    assert job.state is JobState.CANCELLED


async def test_images_that_are_drawn_are_stored_within_the_grace(house: House) -> None:
    blocked = house.folder / "images"
    blocked.write_text("a file where the folder should be")
    async with house.worker() as worker:
        await house.submit("a")
        await until(lambda: house.metrics.value("tandem_spool_bytes") > 0)
        draining = asyncio.create_task(worker.drain(GRACE_S))
        await until(worker._draining.is_set)
        blocked.unlink()
        await draining
        job = await house.jobs.get("a")
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)


async def test_images_that_can_not_be_stored_within_the_grace_are_drawn_elsewhere(house: House) -> None:
    blocked = house.folder / "images"
    blocked.write_text("a file where the folder should be")
    async with house.worker() as worker:
        await house.submit("a")
        await until(lambda: house.metrics.value("tandem_spool_bytes") > 0)
        await worker.drain(0.0)
        job = await house.jobs.get("a")
        assert (job.state, job.attempt) == (JobState.QUEUED, 0)
        assert house.metrics.value("tandem_spool_bytes") == 0
    blocked.unlink()
    async with house.worker("next"):
        job = await house.ended("a")
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)


async def test_a_hung_step_loop_is_abandoned_and_its_jobs_go_on_elsewhere(house: House) -> None:
    """It never hears of it: its step hangs. What it makes of it later is thrown away."""
    runner = GatedRunner(house.runner, free=2)
    async with house.worker("hung", runner) as worker:
        await house.submit("a", num_images=2)
        await house.submit("b", num_images=2)
        assert await asyncio.to_thread(runner.reached.wait, 60)
        started = time.monotonic()
        await worker.abandon()
        assert time.monotonic() - started < RELEASE_S
        assert [(await house.jobs.get(job_id)).state for job_id in ("a", "b")] == [JobState.QUEUED] * 2
        async with house.worker("next", a_runner(house.model)):
            jobs = [await house.ended(job_id) for job_id in ("a", "b")]
        runner.gate.set()
    assert {(job.state, job.attempt) for job in jobs} == {(JobState.SUCCEEDED, 1)}


async def test_a_worker_leaves_although_the_job_store_is_away(jobs_redis: EmbeddedRedis, tmp_path: Path) -> None:
    """What it can't give back has its lease run out."""
    async with open_house(jobs_redis.url, tmp_path) as house:
        runner = GatedRunner(house.runner)
        async with house.worker("cut off", runner) as worker:
            await house.submit("a")
            assert await asyncio.to_thread(runner.reached.wait, 60)
            jobs_redis.kill()
            async with asyncio.timeout(3 * RELEASE_S):
                await worker.abandon()
            assert worker.rows == 0
            await restarted(jobs_redis)
            async with house.worker("next", a_runner(house.model)):
                job = await house.ended("a")
            runner.gate.set()
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)


class SlowToClaim(JobStore):
    """Its answer to a claim comes when it is let through."""

    def __init__(self, house: House) -> None:
        super().__init__(house.settings, house.metrics)
        self.claimed, self.through = asyncio.Event(), asyncio.Event()

    async def claim(self, *args: object, **more: object) -> object:
        answer = await super().claim(*args, **more)  # type: ignore[arg-type]
        if isinstance(answer, Claim):
            self.claimed.set()
            await self.through.wait()
        return answer


async def test_a_job_that_comes_while_the_worker_is_told_to_stop_goes_back(house: House) -> None:
    jobs = SlowToClaim(house)
    async with house.worker(jobs=jobs) as worker:
        await house.submit("a")
        await jobs.claimed.wait()
        draining = asyncio.create_task(worker.drain(GRACE_S))
        await house.jobs.ping()
        jobs.through.set()
        await draining
        job = await house.jobs.get("a")
    await jobs.close()
    assert (job.state, job.attempt, house.steps_made()) == (JobState.QUEUED, 0, 0)
