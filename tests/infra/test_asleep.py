"""What is known of replicas that sleep: what their work costs, and when they will be back."""

import pytest
from support.jobs import MODEL, Bench, a_request, on

from serve.costs import Costs
from serve.jobs.terms import Crew, StepCurve, WorkerReport

CURVES = (StepCurve(height=8, width=8, ms={1: 10.0, 8: 20.0}),)


def worker(name: str, placement: str, *, side: int = 64, start_s: float = 0.0, pace: float = 1.0) -> WorkerReport:
    return WorkerReport(
        name=name,
        model=MODEL,
        placement=placement,
        max_pixels=side**2,
        max_rows=8,
        batch=4,
        vae_factor=8,
        curves=CURVES,
        start_s=start_s,
        pace=pace,
    )


async def crew(bench: Bench) -> Crew:
    """As it is now."""
    bench.store._heard_at = float("-inf")
    return await bench.store.crew(MODEL)


async def falls_silent(bench: Bench, name: str) -> None:
    await bench.store._redis.zadd("tandem:alive", {name: 1})


def test_the_last_report_of_a_placement_outlives_its_replicas(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for each in (worker("a", "small"), worker("b", "small"), worker("c", "large", side=128)):
            await bench.store.report(each)
        before = await crew(bench)
        assert (len(before.reports), before.asleep) == (3, ())
        await falls_silent(bench, "a")
        assert (await crew(bench)).asleep == (), "the other one lives"
        await falls_silent(bench, "b")
        now = await crew(bench)
        assert [each.name for each in now.reports] == ["c"]
        assert [each.placement for each in now.asleep] == ["small"]
        await bench.store.report(worker("d", "small"))
        assert (await crew(bench)).asleep == ()

    on(redis_url, story)


def test_an_order_to_those_who_sleep_costs_what_they_told(redis_url: str) -> None:
    request = a_request(steps=10)

    async def story(bench: Bench) -> None:
        assert not Costs().estimate(request, await crew(bench)).known
        await bench.store.report(worker("a", "small"))
        awake = Costs().estimate(request, await crew(bench))
        await falls_silent(bench, "a")
        asleep = await crew(bench)
        assert asleep.reports == ()
        assert Costs().estimate(request, asleep) == awake
        assert awake.known
        await bench.store.report(worker("b", "other", side=32))
        assert Costs().estimate(request, await crew(bench)).known, "who lives holds no such image, who sleeps does"

    on(redis_url, story)


def test_an_eta_has_what_is_left_of_the_cold_start_until_somebody_is_awake(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.store.report(worker("a", "small", start_s=500.0))
        await falls_silent(bench, "a")
        await bench.store.submit("job", a_request())
        assert (await crew(bench)).start_s(64 * 64) == 500
        assert (await crew(bench)).start_s(65 * 64) == 0, "nobody has told of such images"
        eta_s = (await bench.store.get("job")).eta_s
        assert eta_s is not None
        assert 400 < eta_s <= 501
        key = "tandem:job:job"
        joined = int(await bench.store._redis.hget(key, "waiting") or 0)
        await bench.store._redis.hset(key, "waiting", joined - 300_000)
        later_s = (await bench.store.get("job")).eta_s
        assert later_s is not None
        assert eta_s - later_s == pytest.approx(300, abs=60)
        await bench.store.report(worker("b", "small"))
        await crew(bench)
        awake_s = (await bench.store.get("job")).eta_s
        assert awake_s is not None
        assert awake_s < 100

    on(redis_url, story)


def test_a_report_that_is_none_is_forgotten(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for name, told in (("a", "no JSON"), ("b", "[1]"), ("c", "{}"), ("d", '{"placement": 1}')):
            await bench.store._redis.hset("tandem:workers", name, told)
            await falls_silent(bench, name)
        found = await crew(bench)
        assert (found.reports, found.asleep) == ((), ())
        assert not await bench.store._redis.exists("tandem:workers", "tandem:silent")

    on(redis_url, story)
