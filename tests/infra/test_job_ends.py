"""The end of a job reaches who waits for it: one ring, one look."""

import asyncio
import time
from collections.abc import Iterator

import pytest
from support.jobs import ANY, Bench, a_request, history, on, until
from support.tcp_proxy import TcpProxy

from serve.domain.jobs import JobState
from serve.embedded import EmbeddedRedis
from serve.errors import BackendUnavailable, JobNotFound
from serve.jobs import bell, events
from serve.jobs.bell import CANCEL, ENDED
from serve.jobs.events import end_of, follow
from serve.jobs.store import Claim

SOON_S = 4.0
"""Less than a waiter that heard nothing takes to look again."""


@pytest.fixture
def stood_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """As though every subscription had taken effect long ago: what was rung since is known."""
    monkeypatch.setattr(bell, "REMEMBERED_S", 0.0)


@pytest.fixture
def redis_through_a_proxy(redis_server: EmbeddedRedis, redis_url: str) -> Iterator[tuple[TcpProxy, str]]:
    place, _, port = redis_url.removesuffix("/0").rpartition(":")
    with TcpProxy(int(port)) as proxy:
        yield proxy, f"{place}:{proxy.port}/0"


async def listening(bench: Bench, job_id: str = "another") -> None:
    """Returns once the process hears of every end."""
    async with bench.store.ends(job_id) as rung:
        await asyncio.wait_for(rung.wait(), SOON_S)


async def scripts(bench: Bench) -> int:
    return int((await bench.store._redis.info("commandstats"))["cmdstat_evalsha"]["calls"])


async def told(bench: Bench, job_id: str = "a") -> int | None:
    found = await bench.store._redis.hget(f"tandem:job:{job_id}", "told")
    return None if found is None else int(found)


@pytest.mark.usefixtures("stood_long")
def test_a_wait_is_one_look_however_many_steps_the_job_makes(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await listening(bench)
        await bench.succeed(await bench.claimed("first"))  # Redis has the scripts then
        await end_of(bench.store, "first", JobState.SUCCEEDED)
        claims = [await bench.claimed(f"job{number}", steps=30) for number in range(8)]
        assert all(await asyncio.gather(*(bench.store.renew(claim, 1) for claim in claims)))
        waiters = [asyncio.create_task(end_of(bench.store, claim.job_id, JobState.QUEUED)) for claim in claims]
        before, own = await scripts(bench), 0
        for step in range(2, 31):
            for claim in claims:
                await bench.store.renew(claim, step)
                own += 1
        for claim in claims:
            await bench.succeed(claim)
            own += 1
        jobs = await asyncio.wait_for(asyncio.gather(*waiters), SOON_S)
        assert [(job.id, job.state, len(job.images)) for job in jobs] == [
            (claim.job_id, JobState.SUCCEEDED, 1) for claim in claims
        ]
        assert await scripts(bench) - before - own == len(claims)
        assert bench.store._bell._waiting == {}

    on(redis_url, story)


@pytest.mark.usefixtures("stood_long")
def test_an_end_before_anybody_listened_is_known(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a")
        await listening(bench)
        bench.store._bell._lately.within_s = 60.0
        await bench.succeed(claim)
        await until(lambda: _rung(bench, ENDED, "a"))
        job = await asyncio.wait_for(end_of(bench.store, "a", JobState.QUEUED), SOON_S)
        assert job.state is JobState.SUCCEEDED
        other = await bench.claimed("b")
        async with bench.store.ends("b") as rung:
            assert not rung.is_set()  # another job's end is not this one's
        await bench.succeed(other)

    on(redis_url, story)


async def _rung(bench: Bench, channel: str, job_id: str) -> bool:
    await asyncio.sleep(0)
    return (channel, job_id) in bench.store._bell._lately


def test_an_end_before_the_subscription_is_found(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.succeed(await bench.claimed("a"))
        job = await asyncio.wait_for(end_of(bench.store, "a", JobState.QUEUED), SOON_S)
        assert job.state is JobState.SUCCEEDED

    on(redis_url, story)


@pytest.mark.usefixtures("stood_long")
def test_who_knows_of_the_end_or_of_no_job_does_not_wait(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await listening(bench)
        await bench.store.submit("a", a_request())
        await bench.store.cancel("a")
        bench.store._bell._lately.clear()  # long ago
        job = await asyncio.wait_for(end_of(bench.store, "a", JobState.CANCELLED), SOON_S)
        assert job.state is JobState.CANCELLED
        with pytest.raises(JobNotFound):
            await asyncio.wait_for(end_of(bench.store, "never", JobState.SUCCEEDED), SOON_S)
        for waiter in [end_of(bench.store, "never", JobState.QUEUED), end_of(bench.store, "", JobState.QUEUED)]:
            with pytest.raises((JobNotFound, TimeoutError)):
                await asyncio.wait_for(waiter, 0.2)

    on(redis_url, story)


def test_a_waiter_looks_again_where_no_ring_comes(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LOOK_AGAIN_S", 0.05)

    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a")
        monkeypatch.setattr(bench.store._bell, "_ring", lambda channel, message: None)
        waiter = asyncio.create_task(end_of(bench.store, "a", JobState.QUEUED))
        await bench.succeed(claim)
        assert (await asyncio.wait_for(waiter, SOON_S)).state is JobState.SUCCEEDED

    on(redis_url, story)


def test_a_connection_that_breaks_rings_all(redis_through_a_proxy: tuple[TcpProxy, str], redis_url: str) -> None:
    proxy, url = redis_through_a_proxy

    async def story(bench: Bench) -> None:
        behind = Bench(url)
        claims = [await bench.claimed(name) for name in "ab"]
        waiters = [asyncio.create_task(end_of(behind.store, claim.job_id, JobState.QUEUED)) for claim in claims]
        await listening(behind)
        await asyncio.to_thread(proxy.break_all)
        for claim in claims:
            await bench.succeed(claim)
        jobs = await asyncio.wait_for(asyncio.gather(*waiters), SOON_S)
        assert {job.state for job in jobs} == {JobState.SUCCEEDED}
        await behind.store.close()

    on(redis_url, story)


def test_a_waiter_is_told_of_an_outage(jobs_redis: EmbeddedRedis) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a")
        waiter = asyncio.create_task(end_of(bench.store, "a", JobState.QUEUED))
        await listening(bench)
        await asyncio.to_thread(jobs_redis.kill)
        with pytest.raises(BackendUnavailable):
            await asyncio.wait_for(waiter, 10)
        await asyncio.to_thread(jobs_redis.start)
        await bench.succeed(claim)

    on(jobs_redis.url, story)


def test_the_record_keeps_when_a_client_was_first_told_of_the_end(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for job_id, tell in (("a", end_of(bench.store, "a", JobState.QUEUED)), ("b", history(bench.store, "b"))):
            claim = await bench.claimed(job_id)
            assert await bench.store.ended(job_id) is None
            asking = asyncio.create_task(tell)
            await bench.store.events_after(job_id, None, tell=True)
            assert await told(bench, job_id) is None
            asked_at = time.time()
            await bench.succeed(claim)
            await asyncio.wait_for(asking, SOON_S)
            first = await told(bench, job_id)
            assert first is not None
            assert asked_at - 1 <= first / 1000 <= time.time() + 1
            await history(bench.store, job_id)
            await bench.store.ended(job_id)
            assert await told(bench, job_id) == first
        await bench.succeed(await bench.claimed("c"))
        await bench.store.get("c")
        await bench.store.events_after("c", None)
        assert await told(bench, "c") is None  # questions are no waiting
        await bench.store._redis.hincrby("tandem:job:c", "finished", -61_000)
        await bench.store.ended("c")
        assert await told(bench, "c") is None  # nobody who asks a minute later has waited

    on(redis_url, story)


def test_a_page_before_the_last_tells_of_no_end(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a", steps=300)
        for step in range(1, 251):
            await bench.store.renew(claim, step)
        await bench.succeed(claim)
        page, _ = await bench.store.events_after("a", None, tell=True)
        assert (len(page), await told(bench)) == (200, None)
        assert len(await history(bench.store, "a")) == 253
        assert await told(bench) is not None

    on(redis_url, story)


def test_the_steps_of_a_fast_job_are_read_together_and_its_end_at_once(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "SETTLE_S", 30.0)  # so that only the first and the end are read, however slow this is

    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a", steps=100)
        seen: list[tuple[JobState, int]] = []
        began = asyncio.Event()

        async def listen() -> None:
            async for event in follow(bench.store, "a"):
                seen.append((event.state, event.step))
                if event.state is JobState.ENCODING:
                    began.set()

        listener = asyncio.create_task(listen())
        await asyncio.wait_for(began.wait(), SOON_S)
        before = await scripts(bench)
        for step in range(1, 101):
            await bench.store.renew(claim, step)
        await bench.store.renew(claim, 100, JobState.STORING)
        await bench.succeed(claim)
        await asyncio.wait_for(listener, SOON_S)
        assert seen == [
            (JobState.QUEUED, 0),
            (JobState.ENCODING, 0),
            *((JobState.RUNNING, step) for step in range(1, 101)),
            (JobState.STORING, 100),
            (JobState.SUCCEEDED, 100),
        ]
        assert await scripts(bench) - before - 102 <= 2

    on(redis_url, story)


@pytest.mark.usefixtures("stood_long")
def test_a_cancel_rings_for_its_job_alone(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claims = [await bench.claimed(name) for name in "ab"]
        events = [asyncio.Event(), asyncio.Event()]
        async with bench.store.cancels(claims[0], asyncio.Event()):
            await until(lambda: _heard(bench, CANCEL))
        async with bench.store.cancels(claims[0], events[0]), bench.store.cancels(claims[1], events[1]):
            await bench.store.cancel("b")
            await asyncio.wait_for(events[1].wait(), SOON_S)
            assert not events[0].is_set()
        for claim in claims:
            await bench.store.cancelled(claim)

    on(redis_url, story)


async def _heard(bench: Bench, channel: str) -> bool:
    await asyncio.sleep(0)
    return channel in bench.store._bell._heard_since


def test_what_was_rung_is_forgotten_after_a_while(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await listening(bench)
        for number in range(20):
            await bench.store.submit(f"job{number}", a_request())
            await bench.store.cancel(f"job{number}")
        await until(lambda: _rung(bench, ENDED, "job19"))
        assert len(bench.store._bell._lately) == 20
        bench.store._bell._lately.within_s = 0.0
        await bench.store.submit("last", a_request())
        await bench.store.cancel("last")

        async def forgotten() -> bool:
            await asyncio.sleep(0)
            return len(bench.store._bell._lately) == 1

        await until(forgotten)
        assert not await _rung(bench, ENDED, "job19")

    on(redis_url, story)


def test_a_worker_hears_of_work_and_of_no_ends(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        assert await bench.store.claim("worker", ANY) is None
        waiter = asyncio.create_task(bench.store.wait_for_work("worker", 60))
        await until(lambda: _subscribed(bench))
        await bench.store.submit("a", a_request())
        await asyncio.wait_for(waiter, SOON_S)
        claim = await bench.store.claim("worker", ANY)
        assert isinstance(claim, Claim)
        assert b"tandem:ended" not in await bench.store._redis.pubsub_channels()
        await bench.succeed(claim)

    on(redis_url, story)


async def _subscribed(bench: Bench) -> bool:
    return b"tandem:work:worker" in await bench.store._redis.pubsub_channels()
