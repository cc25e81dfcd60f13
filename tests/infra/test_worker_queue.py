"""What a worker claims, and what it leaves to others."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.house import LONG, GatedRunner, House, a_runner, open_house, until

from serve.domain.jobs import JobState
from serve.jobs.store import Claim, JobStore, Want
from serve.jobs.terms import Hold
from serve.wants import LEFT_TO_OTHERS_S
from serve.worker import IDLE_WAIT_S, Worker

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def house(redis_url: str, tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(redis_url, tmp_path) as house:
        yield house


@pytest.fixture
async def calm_house(redis_url: str, tmp_path: Path) -> AsyncIterator[House]:
    """Leases are so long that no heartbeat and no sweep helps."""
    async with open_house(redis_url, tmp_path, lease_s=600.0) as house:
        yield house


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
        made = house.steps_made()
        job = await house.ended("a")
        assert job.state is JobState.CANCELLED
        await house.submit("b", num_inference_steps=2)
        assert (await house.ended("b")).state is JobState.SUCCEEDED
        assert worker.rows <= 1
        assert house.steps_made() - made <= 1 + 2


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


class Watched(JobStore):
    """Remembers the answers to its worker's claims, and how many images that had in hand when they came. Nobody claims
    while it is closed."""

    def __init__(self, house: House) -> None:
        super().__init__(house.settings, house.metrics)
        self.worker: Worker | None = None
        self.answers: list[tuple[Claim | Hold | None, int]] = []
        self.open = asyncio.Event()
        self.open.set()

    async def claim(self, worker: str, wants: Sequence[Want], *, idle: bool = True, **more: Any) -> Claim | Hold | None:
        await self.open.wait()
        answer = await super().claim(worker, wants, idle=idle, **more)
        self.answers.append((answer, self.worker.rows if self.worker else 0))
        return answer

    @property
    def claims(self) -> list[tuple[str, bool, int]]:
        """Job, whether it is drawn alone, images in hand before it."""
        return [(answer.job_id, answer.alone, rows) for answer, rows in self.answers if isinstance(answer, Claim)]


@pytest.fixture
async def watched(house: House) -> AsyncIterator[Watched]:
    jobs = Watched(house)
    yield jobs
    await jobs.close()


async def test_rows_that_come_free_ask_nothing_of_an_empty_queue(house: House, watched: Watched) -> None:
    began = time.monotonic()
    for number in range(6):
        await house.submit(f"job{number}", num_inference_steps=2)
    async with house.worker(jobs=watched) as watched.worker:
        for number in range(6):
            await house.ended(f"job{number}")
        in_vain = [answer for answer, _ in watched.answers if answer is None]
        assert len(in_vain) <= 2 + (time.monotonic() - began) / IDLE_WAIT_S
    assert [answer.last for answer, _ in watched.answers if isinstance(answer, Claim)] == [False] * 5 + [True]


async def has_killed(house: House, job_id: str) -> None:
    """The job has one attempt left, and its workers died in the others."""
    deadly = JobStore(house.settings.model_copy(update={"lease_s": 0.01}), house.metrics)
    for attempt in range(1, house.settings.max_attempts):
        claim = await deadly.claim(f"killed {attempt}", [Want(house.model.name, 0, 1 << 20)])
        assert isinstance(claim, Claim)
        assert claim.job_id == job_id
        await until(deadly.reap)
    await deadly.close()


async def test_nothing_is_begun_beside_a_job_that_is_drawn_alone(house: House, watched: Watched) -> None:
    await house.stop_sweeping()
    await house.submit("risky")
    await has_killed(house, "risky")
    await house.submit("neighbour")
    async with house.worker(jobs=watched) as watched.worker:
        jobs = [await house.ended(job_id) for job_id in ("risky", "neighbour")]
    assert [(job.state, job.attempt) for job in jobs] == [(JobState.SUCCEEDED, 3), (JobState.SUCCEEDED, 1)]
    assert watched.claims == [("risky", True, 0), ("neighbour", False, 0)]
    (risky, neighbour) = jobs
    assert risky.finished_at is not None
    assert neighbour.started_at is not None
    assert risky.finished_at <= neighbour.started_at, "it is stored before anything that may end the worker is begun"


async def test_a_job_that_is_drawn_alone_waits_until_nothing_is_in_hand(house: House, watched: Watched) -> None:
    """And what is behind it waits as well, or a busy replica would never come to it."""
    await house.stop_sweeping()
    runner = GatedRunner(house.runner)
    async with house.worker(runner=runner, jobs=watched) as watched.worker:
        await house.submit("first")
        assert await asyncio.to_thread(runner.reached.wait, 60)
        watched.open.clear()
        await house.submit("risky")
        await has_killed(house, "risky")
        await house.submit("behind")
        watched.open.set()
        await until(lambda: (Hold.ALONE, 1) in watched.answers)
        runner.gate.set()
        jobs = [await house.ended(job_id) for job_id in ("first", "risky", "behind")]
    assert [(job.state, job.attempt) for job in jobs] == [(JobState.SUCCEEDED, attempt) for attempt in (1, 3, 1)]
    assert watched.claims == [("first", False, 0), ("risky", True, 0), ("behind", False, 0)]
