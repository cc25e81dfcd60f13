"""What the operator is shown of the queue, the backlog and the workers."""

import asyncio
from urllib.parse import urlsplit

import pytest
from support.jobs import ANY, BROKEN, MODEL, Bench, a_request, on, until

from serve.embedded import EmbeddedRedis
from serve.errors import BackendUnavailable
from serve.jobs.gauges import Place, QueueGauges, tell_gauges
from serve.jobs.terms import Terms, WorkerReport

MILLISECOND = 0.001
"""Of which the store's times are whole ones."""
SMALL, LARGE = Place(MODEL, "small", "4gb"), Place(MODEL, "large", None)


def report(name: str, place: Place, pace: float = 1.0) -> WorkerReport:
    return WorkerReport(
        name=name,
        model=place.model,
        placement=place.placement,
        gpu_class=place.gpu_class,
        max_pixels=4096,
        max_rows=8,
        batch=4,
        vae_factor=8,
        pace=pace,
    )


async def waited(bench: Bench, seconds: float) -> None:
    """Let so much time pass on the Redis' clock; there is nothing to subscribe to."""
    began = await clock(bench)

    async def passed() -> bool:
        return await clock(bench) - began >= seconds + MILLISECOND

    await until(passed)


async def clock(bench: Bench) -> float:
    """Seconds of the Redis' clock."""
    seconds, microseconds = await bench.store._redis.time()
    return float(seconds + microseconds / 1e6)


def by_state(bench: Bench, model: str = MODEL) -> dict[str, float]:
    states = ("queued", "encoding", "running", "storing")
    return {
        state: number
        for state in states
        if (number := bench.metrics.value("tandem_unfinished_jobs", model=model, state=state))
    }


def test_jobs_are_told_by_model_and_state_from_the_order_to_the_end(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        gauges = QueueGauges(bench.store, bench.metrics, {SMALL: 1})
        await gauges.tell()
        assert by_state(bench) == {}
        for job_id in "abc":
            await bench.store.submit(job_id, a_request())
        await bench.store.submit("d", a_request(model="other"))
        await gauges.tell()
        assert by_state(bench) == {"queued": 3}
        assert by_state(bench, "other") == {"queued": 1}
        first, second = [await bench.store.claim("worker", ANY) for _ in "ab"]
        assert first
        assert second
        await bench.store.renew(first, 2)
        await gauges.tell()
        assert by_state(bench) == {"queued": 1, "encoding": 1, "running": 1}
        await bench.succeed(first)
        await bench.store.fail(second, BROKEN, retry=True)
        await bench.store.cancel("d")
        await gauges.tell()
        assert by_state(bench) == {"queued": 2}
        assert by_state(bench, "other") == {}, "a model without jobs is told as none"

    on(redis_url, story)


def test_the_age_is_that_of_the_job_that_has_waited_longest_since_it_joined_the_queue(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        gauges = QueueGauges(bench.store, bench.metrics, {SMALL: 1})

        def age() -> float:
            return bench.metrics.value("tandem_queue_age_seconds", model=MODEL)

        claim = await bench.claimed("first")
        await gauges.tell()
        assert age() == 0, "what is held does not wait"
        await waited(bench, 0.2)
        before = await clock(bench)
        await bench.store.submit("second", a_request())
        await waited(bench, 0.1)
        await gauges.tell()
        assert 0.1 <= age() <= await clock(bench) - before + MILLISECOND
        then, again = age(), await clock(bench)
        await bench.store.fail(claim, BROKEN, retry=True)  # first in the queue again, but it waits only now
        await bench.store.submit("third", a_request())
        await gauges.tell()
        assert then <= age()
        await bench.store.cancel("second")
        await gauges.tell()
        assert age() <= await clock(bench) - again + MILLISECOND

    on(redis_url, story)


def test_the_backlog_is_the_predicted_work_that_waits_divided_by_the_replicas_at_their_pace(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        def backlog() -> float:
            return bench.metrics.value("tandem_backlog_seconds", model=MODEL)

        for job_id, cost_ms in (("a", 4000), ("b", 2000)):
            await bench.store.submit(job_id, a_request(), terms=Terms(cost_ms=cost_ms))
        await QueueGauges(bench.store, bench.metrics, {SMALL: 1}).tell()
        assert backlog() == 6, "nobody lives: as much as for one replica"
        for name, place, pace in (("one", SMALL, 1.0), ("two", LARGE, 2.0)):
            await bench.store.report(report(name, place, pace))
        later = Bench(redis_url)  # which has not just asked for the workers
        try:
            await QueueGauges(later.store, later.metrics, {SMALL: 1}).tell()
            assert later.metrics.value("tandem_backlog_seconds", model=MODEL) == pytest.approx(1.5 * 6 / 2)
        finally:
            await later.store.close()

    on(redis_url, story)


def test_replicas_are_told_by_placement_and_a_placement_without_any_as_none(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.store.report(report("one", LARGE))
        await bench.store.report(report("two", LARGE))
        await QueueGauges(bench.store, bench.metrics, {SMALL: 3}).tell()

        def told(name: str) -> dict[tuple[str, str], float]:
            return {
                (sample.labels["placement"], sample.labels["gpu_class"]): sample.value
                for family in bench.metrics.registry.collect()
                for sample in family.samples
                if sample.name == name
            }

        assert told("tandem_replicas") == {("small", "4gb"): 0, ("large", ""): 2}
        assert told("tandem_replicas_wanted") == {("small", "4gb"): 3}, "the other one is not of these settings"

    on(redis_url, story)


def test_the_store_is_as_full_as_its_redis_says(jobs_redis: EmbeddedRedis) -> None:
    async def story(bench: Bench) -> None:
        gauges = QueueGauges(bench.store, bench.metrics, {SMALL: 1})

        def used() -> float:
            return bench.metrics.value("tandem_job_store_memory_bytes")

        def limit() -> float:
            return bench.metrics.value("tandem_job_store_memory_limit_bytes")

        bench.metrics.set("tandem_job_store_memory_limit_bytes", 5)
        await gauges.tell()
        assert limit() == 5, "where there is no bound none is told: of 0 any memory would be too much"
        before = used()
        assert before > 0
        megabyte = 2**20
        await bench.store._redis.config_set("maxmemory", 64 * megabyte)
        await bench.store._redis.set("ballast", bytes(8 * megabyte))
        await gauges.tell()
        assert limit() == 64 * megabyte
        assert 8 * megabyte <= used() - before < 16 * megabyte
        await bench.store._redis.delete("ballast")

    on(jobs_redis.url, story)


def test_a_redis_that_may_not_be_asked_how_full_it_is_is_no_broken_one(jobs_redis: EmbeddedRedis) -> None:
    url = urlsplit(jobs_redis.url)

    async def story(bench: Bench) -> None:
        await bench.store._redis.execute_command(
            "ACL", "SETUSER", "tenant", "on", ">secret", "~*", "&*", "+@all", "-info"
        )
        place = url._replace(netloc=f"tenant:secret@{url.hostname}:{url.port}")
        tenant = Bench(place.geturl())
        try:
            assert await tenant.store.memory() is None
            await QueueGauges(tenant.store, tenant.metrics, {SMALL: 1}).tell()
            assert tenant.metrics.value("tandem_replicas_wanted") == 1
            assert tenant.metrics.value("tandem_job_store_errors_total") == 0
        finally:
            await tenant.store.close()

    on(jobs_redis.url, story)


def test_a_job_store_that_is_away_is_counted_and_what_it_would_say_is_not_told() -> None:
    async def story() -> None:
        bench = Bench("redis://127.0.0.1:1/0")
        try:
            gauges = QueueGauges(bench.store, bench.metrics, {SMALL: 1})
            with pytest.raises(BackendUnavailable):
                await gauges.tell()
            assert bench.metrics.value("tandem_job_store_errors_total") == 1
            task = asyncio.create_task(tell_gauges(gauges, interval_s=0.01))

            async def asked_again() -> bool:
                await asyncio.sleep(0.01)
                return bench.metrics.value("tandem_job_store_errors_total") >= 3

            await until(asked_again)  # it goes on asking
            assert not task.done()
            task.cancel()
            samples = [sample for family in bench.metrics.registry.collect() for sample in family.samples]
            assert not [each for each in samples if each.name.startswith(("tandem_unfinished", "tandem_queue_age"))]
        finally:
            await bench.store.close()

    asyncio.run(story())
