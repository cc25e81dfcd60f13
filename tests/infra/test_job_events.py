"""Who waits: followers of a job, workers without work, renewals on their way."""

import asyncio

import pytest
from support.jobs import ANY, Bench, a_request, history, on, states, until

from serve.domain.jobs import JobEvent, JobState
from serve.embedded import EmbeddedRedis
from serve.errors import BackendUnavailable, InvalidRequest, JobNotFound, LeaseLost
from serve.jobs.events import follow
from serve.jobs.store import Claim


def test_events_are_followed_live_by_many_and_resumed_anywhere(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.store.submit("a", a_request())
        followers = [asyncio.create_task(history(bench.store, "a")) for _ in range(100)]
        claim = await bench.store.claim("worker", ANY)
        assert claim is not None
        for step in (1, 2, 2, 1, 3):
            await bench.store.renew(claim, step)
        await bench.succeed(claim)
        told = await asyncio.wait_for(asyncio.gather(*followers), 10)
        running = [(JobState.RUNNING, step) for step in range(1, 4)]
        assert states(told[0]) == [(JobState.QUEUED, 0), (JobState.ENCODING, 0), *running, (JobState.SUCCEEDED, 4)]
        assert all(each == told[0] for each in told)
        for number, event in enumerate(told[0]):
            assert await history(bench.store, "a", event.id) == told[0][number + 1 :]
        with pytest.raises(JobNotFound):
            await history(bench.store, "never")
        for nonsense in ("", "$", "1", "0-0\n", "-", "9" * 30 + "-0"):
            with pytest.raises(InvalidRequest):
                await history(bench.store, "a", nonsense)

    on(redis_url, story)


def test_a_follower_hears_what_happens_after_another_left(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a", steps=40)
        for step in range(1, 20):
            async with bench.store.changes("a"):
                pass
            async with bench.store.changes("a") as changed:
                await asyncio.wait_for(changed.wait(), 2)  # every subscription rings once
                changed.clear()
                await bench.store.renew(claim, step)
                await asyncio.wait_for(changed.wait(), 2)

    on(redis_url, story)


def test_a_hundred_followers_hang_up_and_leave_nothing(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a")

        async def hang_up() -> None:
            events = follow(bench.store, "a")
            async for event in events:
                if event.state is JobState.ENCODING:
                    break
            await events.aclose()  # type: ignore[attr-defined]

        await asyncio.gather(*(hang_up() for _ in range(100)))
        assert bench.store._bell._waiting == {}

        async def unsubscribed() -> bool:
            return set(await bench.store._redis.pubsub_channels()) == {b"tandem:bell", b"tandem:ended"}

        await until(unsubscribed)
        await bench.succeed(claim)

    on(redis_url, story)


def test_waiting_for_work_ends_when_work_comes_even_between_two_waits(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        async def next_claim() -> Claim:
            while (claim := await bench.store.claim("worker", ANY)) is None:
                await bench.store.wait_for_work("worker", 60)
            return claim

        for job_id in "abc":
            waiter = asyncio.create_task(next_claim())
            await bench.store.wait_for_work("worker", 0.01)
            await bench.store.submit(job_id, a_request())
            claim = await asyncio.wait_for(waiter, 5)
            assert claim.job_id == job_id
        await bench.store.submit("d", a_request())
        assert (await asyncio.wait_for(next_claim(), 5)).job_id == "d"

    on(redis_url, story)


def test_renewals_of_many_jobs_travel_together(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claims = [await bench.claimed(f"job{number}", steps=50) for number in range(16)]
        before = (await bench.store._redis.info("commandstats"))["cmdstat_evalsha"]["calls"]
        for step in range(50):
            assert all(await asyncio.gather(*(bench.store.renew(claim, step + 1) for claim in claims)))
        after = (await bench.store._redis.info("commandstats"))["cmdstat_evalsha"]["calls"]
        assert after - before <= 50
        await bench.store.release(claims[3])
        answers = await asyncio.gather(*(bench.store.renew(claim) for claim in claims), return_exceptions=True)
        assert [isinstance(answer, LeaseLost) for answer in answers] == [number == 3 for number in range(16)]

    on(redis_url, story)


def test_a_follower_is_told_of_an_outage_and_resumes(jobs_redis: EmbeddedRedis) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a")
        seen: list[JobEvent] = []

        async def listen() -> None:
            async for event in follow(bench.store, "a", seen[-1].id if seen else None):
                seen.append(event)

        listener = asyncio.create_task(listen())
        await until(lambda: _reached(seen, 2))
        await asyncio.to_thread(jobs_redis.kill)
        with pytest.raises(BackendUnavailable):
            await asyncio.wait_for(listener, 10)
        await asyncio.to_thread(jobs_redis.start)
        resumed = asyncio.create_task(listen())
        await bench.succeed(claim)
        await asyncio.wait_for(resumed, 10)
        assert states(seen) == [(JobState.QUEUED, 0), (JobState.ENCODING, 0), (JobState.SUCCEEDED, 4)]

    on(jobs_redis.url, story)


async def _reached(seen: list[JobEvent], number: int) -> bool:
    await asyncio.sleep(0)
    return len(seen) >= number
