"""Workers that vanish, time that runs out, a Redis that dies or is full."""

import asyncio
import contextlib
import time
from pathlib import Path

import pytest
from support.jobs import ANY, BROKEN, Bench, a_request, on, until

from serve.domain.jobs import Job, JobState
from serve.embedded import EmbeddedRedis
from serve.errors import BackendUnavailable, LeaseLost
from serve.jobs.store import Hold
from serve.jobs.sweeper import sweep
from serve.results.local import LocalStore


def test_a_release_costs_no_attempt_but_fences_the_worker(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for _ in range(5):
            claim = await bench.claimed("a")
            assert claim.attempt == 1
            await bench.store.release(claim)
        successor = await bench.store.claim("worker", ANY)
        assert successor is not None
        assert successor.attempt == claim.attempt
        with pytest.raises(LeaseLost):
            await bench.store.renew(claim, 2)
        with pytest.raises(LeaseLost):
            await bench.succeed(claim)
        await bench.succeed(successor)

    on(redis_url, story, max_attempts=1)


def test_a_lapsed_lease_goes_to_another_worker_and_the_late_one_is_fenced(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        late = await bench.claimed("a")
        await until(bench.store.reap)
        assert (await bench.store.get("a")).state is JobState.QUEUED
        for write in (
            bench.succeed(late),
            bench.store.fail(late, BROKEN, retry=True),
            bench.store.fail(late, BROKEN, retry=False),
            bench.store.cancelled(late),
            bench.store.release(late),
            bench.store.renew(late, 3),
        ):
            with pytest.raises(LeaseLost):
                await write
        successor = await bench.store.claim("worker", ANY)
        assert successor is not None
        assert successor.attempt == 2
        with pytest.raises(LeaseLost):
            await bench.succeed(late)
        await until(bench.store.reap)
        lost = await bench.store.get("a")
        assert lost.error is not None
        assert (lost.state, lost.error.code) == (JobState.FAILED, "worker_lost")
        assert bench.metrics.value("tandem_jobs_total") == 1
        assert bench.metrics.value("tandem_jobs_total", state="failed", dead="yes") == 1

    on(redis_url, story, lease_s=0.001, max_attempts=2)


def test_a_renewed_lease_does_not_lapse(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a")
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            assert await bench.store.renew(claim)
            assert await bench.store.reap() == 0
        await bench.succeed(claim)

    on(redis_url, story, lease_s=0.5)


@pytest.mark.parametrize("end", ["lapse", "retry", "release"])
def test_a_cancelled_job_is_not_run_again(redis_url: str, end: str) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a")
        await bench.store.cancel("a")
        if end == "lapse":
            await until(bench.store.reap)
        elif end == "retry":
            await bench.store.fail(claim, BROKEN, retry=True)
        else:
            await bench.store.release(claim)
        assert (await bench.store.get("a")).state is JobState.CANCELLED

    on(redis_url, story, lease_s=0.001)


def test_an_overdue_job_expires_queued_or_running(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("running")
        await bench.store.submit("queued", a_request())
        total = 0

        async def all_reaped() -> bool:
            nonlocal total
            total += await bench.store.reap()
            return total == 2

        # An overdue job is not claimed even before the sweep comes.
        await bench.store._redis.zadd("tandem:deadlines", {"queued": 1})
        assert await bench.store.claim("worker", ANY) is Hold.UNFIT
        await until(all_reaped)
        for job_id, code in (("running", "timed_out"), ("queued", "queue_timeout")):
            job = await bench.store.get(job_id)
            assert job.error is not None
            assert (job.state, job.error.code) == (JobState.EXPIRED, code)
        with pytest.raises(LeaseLost):
            await bench.store.renew(claim, 1)

    on(redis_url, story, timeout_s=0.2)


def test_records_and_streams_leave_after_their_time(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for number in range(50):
            await bench.succeed(await bench.claimed(f"job{number}"))

        async def all_forgotten() -> bool:
            await bench.store.forget(await bench.store.overdue())
            # A claim is remembered for one lease, and a worker stands by for a minute.
            workers = b"tandem:claim:", b"tandem:standby:"
            left = [key async for key in bench.store._redis.scan_iter("*") if not key.startswith(workers)]
            return left == [b"tandem:sequence"]

        await until(all_forgotten)

    on(redis_url, story, result_ttl_s=0.05)


def test_a_store_that_is_away_is_said_so_and_no_accepted_job_is_lost(jobs_redis: EmbeddedRedis) -> None:
    async def story(bench: Bench) -> None:
        store = bench.store
        accepted: list[str] = []
        outage = asyncio.Event()

        async def submit_until_the_outage(client: int) -> None:
            for number in range(10_000):
                try:
                    await store.submit(f"job{client}-{number}", a_request())
                except BackendUnavailable:
                    return
                accepted.append(f"job{client}-{number}")
                if len(accepted) > 100:
                    outage.set()

        claim = await bench.claimed("running")
        clients = [asyncio.create_task(submit_until_the_outage(client)) for client in range(4)]
        waiter = asyncio.create_task(store.wait_for_work("worker", 60))
        await outage.wait()
        await asyncio.to_thread(jobs_redis.kill)
        await asyncio.wait_for(asyncio.gather(*clients), 30)
        await asyncio.wait_for(waiter, 5)
        for call in (store.get("running"), store.renew(claim, 1), bench.succeed(claim), store.reap(), store.ping()):
            with pytest.raises(BackendUnavailable) as away:
                await call
            assert away.value.param == "jobs.redis_url"
            assert away.value.retry_after_s
        await asyncio.to_thread(jobs_redis.start)
        await bench.succeed(claim)
        found = [await store.get(job_id) for job_id in accepted]
        assert {job.state for job in found} == {JobState.QUEUED}
        for client in range(4):
            places = [job.position or 0 for job in found if job.id.startswith(f"job{client}-")]
            assert places == sorted(places)

    on(jobs_redis.url, story, max_queued=100_000)


def test_many_processes_may_sweep_at_once(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for number in range(250):
            await bench.claimed(f"job{number}")
        others = [Bench(redis_url, lease_s=0.001) for _ in range(4)]
        total = 0

        async def all_reaped() -> bool:
            nonlocal total
            total += sum(await asyncio.gather(*(each.store.reap() for each in others)))
            return total >= 250

        await until(all_reaped)
        assert total == 250
        assert await bench.store.queue_depth() == 250
        for other in others:
            await other.store.close()

    on(redis_url, story, lease_s=0.001, max_queued=1000)


def test_a_full_disk_or_memory_refuses_and_keeps_what_was_accepted(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        accepted: list[Job] = []
        with contextlib.suppress(BackendUnavailable):
            while True:
                accepted.append((await bench.store.submit(f"job{len(accepted)}", a_request("x" * 8000))).job)
        assert accepted
        assert [(await bench.store.get(job.id)).id for job in accepted] == [job.id for job in accepted]

    with EmbeddedRedis(tmp_path, "jobs", max_bytes=3 << 20) as server:
        on(server.url, story, max_queued=100_000)


def test_after_an_outage_the_workers_speak_before_the_sweep(jobs_redis: EmbeddedRedis, tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        results = LocalStore(tmp_path)
        sweeping = asyncio.create_task(sweep(bench.store, results, lease_s=1.0, interval_s=0.01))
        claim = await bench.claimed("a")
        await asyncio.to_thread(jobs_redis.kill)
        end = time.monotonic() + 1.2
        while time.monotonic() < end:  # the lease runs out meanwhile
            with pytest.raises(BackendUnavailable):
                await bench.store.ping()
        await asyncio.to_thread(jobs_redis.start)
        assert await bench.store.renew(claim)
        await bench.succeed(claim)
        sweeping.cancel()

    on(jobs_redis.url, story, lease_s=1.0)
