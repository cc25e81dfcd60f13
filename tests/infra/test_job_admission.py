"""What is logged and what is refused: bounds on the queue and on each owner, and orders that are sent again."""

import asyncio
from dataclasses import replace

import pytest
from support.jobs import ANY, MODEL, Bench, a_request, on

from serve.callers import Allowance
from serve.domain.jobs import JobState
from serve.errors import Conflict, InvalidRequest, JobGone, JobNotFound, QueueFull, RateLimited
from serve.jobs.store import Claim, Terms
from serve.jobs.terms import WorkerReport


def a_report(name: str, pace: float = 1.0, **other: object) -> WorkerReport:
    values = {"model": MODEL, "placement": "a card", "max_pixels": 1 << 20, "max_rows": 32, "batch": 8, "vae_factor": 8}
    return WorkerReport(name=name, pace=pace, **(values | other))  # type: ignore[arg-type]


def test_the_queue_is_bounded_by_the_work_in_it_too(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        minute = Terms(cost_ms=60_000)
        for number in range(10):
            await bench.store.submit(f"job{number}", a_request(), terms=minute)
        with pytest.raises(QueueFull, match="600 s of work") as full:
            await bench.store.submit("more", a_request(), terms=minute)
        # One minute is too much, and so it is a minute until there is room for it.
        assert full.value.retry_after_s == pytest.approx(60)
        await bench.store.submit("other", a_request(model="other"), terms=minute)
        await bench.store.claim("worker", ANY)
        await bench.store.submit("more", a_request(), terms=minute)

    on(redis_url, story, max_queued_s=600)


def test_an_empty_queue_takes_a_job_however_long(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.store.submit("a", a_request(), terms=Terms(cost_ms=10_000_000))
        with pytest.raises(QueueFull):
            await bench.store.submit("b", a_request())

    on(redis_url, story, max_queued_s=600)


def test_more_replicas_hold_more_work_and_drain_it_sooner(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for name in "abc":
            await bench.store.report(a_report(name, pace=2.0))
        await bench.store.report(a_report("elsewhere", model="other"))
        assert [report.name for report in (await bench.store.crew(MODEL)).reports] == ["a", "b", "c"]
        for number in range(30):
            job = (await bench.store.submit(f"job{number}", a_request(), terms=Terms(cost_ms=60_000))).job
        assert job.eta_s == pytest.approx(30 * 60 / 3 * 2.0, rel=0.01)
        with pytest.raises(QueueFull) as full:
            await bench.store.submit("more", a_request(), terms=Terms(cost_ms=60_000))
        assert full.value.retry_after_s is not None
        assert 40 <= full.value.retry_after_s <= 120

    on(redis_url, story, max_queued_s=600)


def test_a_worker_that_says_no_more_counts_no_more(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.store.report(a_report("a"))
        await bench.store._redis.zadd("tandem:alive", {"a": 1})
        assert (await bench.store.crew(MODEL)).reports == ()

    on(redis_url, story)


def test_orders_a_minute_are_a_bucket_that_fills(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        terms = Terms(owner="k", allowance=Allowance(requests_per_minute=3))
        for number in range(3):
            answer = await bench.store.submit(f"job{number}", a_request(), terms=terms)
            (limit,) = answer.limits
            assert (limit.name, limit.limit, limit.remaining, limit.window_s) == (
                ("requests_per_minute", 3, 2 - number, 60)
            )
        with pytest.raises(RateLimited) as refused:
            await bench.store.submit("job3", a_request(), terms=terms)
        assert refused.value.retry_after_s is not None
        assert 15 < refused.value.retry_after_s <= 20
        assert refused.value.limits[0].remaining == 0
        assert 55 < refused.value.limits[0].reset_s <= 60
        with pytest.raises(JobNotFound):
            await bench.store.get("job3")
        await bench.store.submit("others", a_request(), terms=Terms(owner="l", allowance=terms.allowance))
        # What was refused took nothing: a third of a minute later there is one order again, and only one.
        at = int(await bench.store._redis.hget("tandem:allowance:k", "requests_per_minute:at"))
        await bench.store._redis.hset("tandem:allowance:k", "requests_per_minute:at", at - 20_100)
        await bench.store.submit("job4", a_request(), terms=terms)
        with pytest.raises(RateLimited):
            await bench.store.submit("job5", a_request(), terms=terms)

    on(redis_url, story)


def test_a_days_work_is_a_bucket_of_predicted_seconds(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        terms = Terms(owner="k", cost_ms=4000, allowance=Allowance(engine_s_per_day=10.0))
        limits = [(await bench.store.submit(f"job{n}", a_request(), terms=terms)).limits[0] for n in range(2)]
        assert [(limit.limit, limit.remaining, limit.window_s) for limit in limits] == [(10, 6, 86400), (10, 2, 86400)]
        with pytest.raises(RateLimited, match="engine_s_per_day") as refused:
            await bench.store.submit("job2", a_request(), terms=terms)
        assert refused.value.retry_after_s == pytest.approx(2 / 10 * 86400, rel=0.01)
        # What is more than the whole bucket is let in by a full one and paid off later.
        whole = Terms(owner="l", cost_ms=30_000, allowance=Allowance(engine_s_per_day=10.0))
        await bench.store.submit("large", a_request(), terms=whole)
        with pytest.raises(RateLimited) as refused:
            await bench.store.submit("small", a_request(), terms=Terms(owner="l", allowance=whole.allowance))
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s > 2 * 86400 - 60

    on(redis_url, story)


def test_unfinished_jobs_are_bounded_and_an_end_makes_room(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        terms = Terms(owner="k", allowance=Allowance(max_unfinished=2))
        for job_id in "ab":
            await bench.store.submit(job_id, a_request(), terms=terms)
        claim = await bench.store.claim("worker", ANY)
        assert isinstance(claim, Claim)
        with pytest.raises(RateLimited, match="2 at most"):
            await bench.store.submit("c", a_request(), terms=terms)
        await bench.succeed(claim)
        await bench.store.submit("c", a_request(), terms=terms)

    on(redis_url, story)


def test_who_is_over_the_own_bound_is_told_so_in_a_full_house_too(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        terms = Terms(owner="k", allowance=Allowance(max_unfinished=1))
        await bench.store.submit("a", a_request(), terms=terms)
        with pytest.raises(RateLimited):
            await bench.store.submit("b", a_request(), terms=terms)
        await bench.store.submit("c", a_request(), terms=Terms(owner="l"))
        with pytest.raises(RateLimited):
            await bench.store.submit("d", a_request(), terms=terms)
        with pytest.raises(QueueFull):
            await bench.store.submit("e", a_request(), terms=Terms(owner="m"))

    on(redis_url, story, max_queued=1)


def test_the_same_key_a_hundred_times_at_once_is_one_job(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        terms = Terms(owner="k", fingerprint="an order", allowance=Allowance(requests_per_minute=5))
        answers = await asyncio.gather(
            *(bench.store.submit("a", replace(a_request(), seed=n), terms=terms) for n in range(100)),
            return_exceptions=True,
        )
        jobs = [answer for answer in answers if not isinstance(answer, BaseException)]
        assert len(jobs) == 100
        assert sum(not answer.replayed for answer in jobs) == 1
        assert len({answer.job.request for answer in jobs}) == 1
        assert jobs[0].limits[0].remaining >= 4 - 1  # the replays cost nothing
        assert await bench.store.queue_depth() == 1

    on(redis_url, story)


def test_an_id_stands_for_its_order_and_owner_even_when_the_record_is_gone(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        store, terms = bench.store, Terms(owner="k", fingerprint="an order")
        assert await store.peek("k", "an order", job_id="a") is None
        await store.submit("a", a_request(), terms=terms)
        assert (await store.peek("k", "an order", job_id="a")) == await store.get("a", "k")
        for gone in (False, True):
            if gone:
                await store.cancel("a")
                await store._redis.zadd("tandem:ended", {"a": 1})
                assert await store.forget(["a"]) == 1
                with pytest.raises(JobGone):
                    await store.submit("a", a_request(), terms=terms)
                with pytest.raises(JobGone):
                    await store.peek("k", "an order", job_id="a")
            for owner, fingerprint, refusal in (("k", "other", Conflict), ("l", "an order", JobNotFound)):
                with pytest.raises(refusal):
                    await store.submit("a", a_request(), terms=Terms(owner=owner, fingerprint=fingerprint))
                with pytest.raises(refusal):
                    await store.peek(owner, fingerprint, job_id="a")
        assert 86_000_000 < await store._redis.pttl("tandem:order:id:a") <= 86_400_000

    on(redis_url, story)


def test_a_key_is_its_owners_alone_and_names_no_id(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        store = bench.store
        first = await store.submit("a", a_request(), terms=Terms(owner="k", fingerprint="x", key="mine"))
        again = await store.submit("b", a_request(), terms=Terms(owner="k", fingerprint="x", key="mine"))
        assert (again.job.id, again.replayed, first.replayed) == ("a", True, False)
        assert await store.peek("k", "x", key="mine") == first.job
        assert await store.peek("l", "x", key="mine") is None
        others = await store.submit("c", a_request(), terms=Terms(owner="l", fingerprint="x", key="mine"))
        assert (others.job.id, others.replayed) == ("c", False)
        with pytest.raises(Conflict):
            await store.submit("d", a_request(), terms=Terms(owner="k", fingerprint="y", key="mine"))
        with pytest.raises(JobNotFound):
            await store.get("b")
        # Under another's id nothing is found, and nothing can be put in its way.
        with pytest.raises(JobNotFound):
            await store.submit("a", a_request(), terms=Terms(owner="l", fingerprint="x"))

    on(redis_url, story)


def test_a_full_queue_keeps_room_for_who_has_less_than_their_share(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        store, heavy = bench.store, Terms(owner="heavy")
        for number in range(10):
            await store.submit(f"heavy{number}", a_request(), terms=heavy)
        with pytest.raises(QueueFull):
            await store.submit("more", a_request(), terms=heavy)
        for number in range(5):  # a share of two owners is five; half as much again is five more
            await store.admit(MODEL, 1, "light", Allowance())
            await store.submit(f"light{number}", a_request(), terms=Terms(owner="light"))
        for owner in ("light", "heavy", "third"):
            with pytest.raises(QueueFull):
                await store.admit(MODEL, 1, owner, Allowance())
            with pytest.raises(QueueFull):
                await store.submit("x", a_request(), terms=Terms(owner=owner))

    on(redis_url, story, max_queued=10)


def test_a_look_at_the_door_says_what_the_submission_would(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        store, allowance = bench.store, Allowance(requests_per_minute=1, max_unfinished=5)
        await store.admit(MODEL, 1, "k", allowance)
        await store.submit("a", a_request(), terms=Terms(owner="k", allowance=allowance))
        with pytest.raises(RateLimited) as refused:
            await store.admit(MODEL, 1, "k", allowance)
        assert [limit.name for limit in refused.value.limits] == ["requests_per_minute", "max_unfinished"]
        await store.admit(MODEL, 1, "l", allowance)

    on(redis_url, story)


def test_a_job_is_its_owners_alone(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        store = bench.store
        await store.submit("a", a_request(), terms=Terms(owner="k"))
        assert (await store.get("a", "k")).owner == "k"
        assert (await store.get("a")).owner == "k"
        for stranger in ("l", ""):
            with pytest.raises(JobNotFound):
                await store.get("a", stranger)
            with pytest.raises(JobNotFound):
                await store.cancel("a", stranger)
            assert (await store.jobs(stranger)).jobs == ()
        assert (await store.get("a")).state is JobState.QUEUED
        assert (await store.cancel("a", "k")).state is JobState.CANCELLED

    on(redis_url, story)


def test_lists_are_paged_and_chosen_by_state(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for number in range(25):
            await bench.store.submit(f"job{number}", a_request(), terms=Terms(owner="k"))
            if number % 5 == 0:
                await bench.store.cancel(f"job{number}")
        told: list[str] = []
        after = None
        while True:
            page = await bench.store.jobs("k", after=after, count=4)
            told += [job.id for job in page.jobs]
            if (after := page.next) is None:
                break
        assert told == [f"job{number}" for number in reversed(range(25))]
        ended = await bench.store.jobs("k", states=[JobState.CANCELLED])
        assert [job.id for job in ended.jobs] == ["job20", "job15", "job10", "job5", "job0"]
        with pytest.raises(InvalidRequest):
            await bench.store.jobs("k", after="-inf")

    on(redis_url, story)
