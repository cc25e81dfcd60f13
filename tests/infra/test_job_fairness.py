"""Whose job is claimed next: owners take turns by weight and predicted cost, and everyone is told their place."""

import asyncio
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.jobs import ANY, BROKEN, MODEL, Bench, a_request, on

from serve.callers import Allowance
from serve.domain.jobs import JobState
from serve.domain.orders import Priority
from serve.jobs.store import Claim, Hold, Terms, Want


async def _claim_all(bench: Bench) -> list[str]:
    order = []
    while isinstance(claim := await bench.store.claim("worker", ANY), Claim):
        order.append(claim.job_id)
    return order


def test_who_sent_ninety_one_jobs_does_not_keep_nine_others_waiting(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for number in range(91):
            await bench.store.submit(f"heavy{number}", a_request(), terms=Terms(owner="heavy", cost_ms=250))
        for number in range(9):
            await bench.store.submit(f"light{number}", a_request(), terms=Terms(owner=f"k{number}", cost_ms=250))
        order = await _claim_all(bench)
        assert len(order) == 100
        assert {f"light{number}" for number in range(9)} <= set(order[:10])

    on(redis_url, story)


def test_weights_share_the_time_and_not_the_jobs(redis_url: str) -> None:
    """Three times the weight is three times the milliseconds; who sends jobs of half the cost gets twice as many."""
    terms = {
        "a": Terms(owner="a", weight=3.0, cost_ms=100),
        "b": Terms(owner="b", weight=1.0, cost_ms=100),
        "c": Terms(owner="c", weight=1.0, cost_ms=50),
    }

    async def story(bench: Bench) -> None:
        for number in range(100):
            for owner, own in terms.items():
                await bench.store.submit(f"{owner}{number}", a_request(), terms=own)
        order = await _claim_all(bench)
        for first in (30, 60, 120):
            took = Counter(job_id[0] for job_id in order[:first])
            ms = {owner: number * terms[owner].cost_ms / terms[owner].weight for owner, number in took.items()}
            assert max(ms.values()) - min(ms.values()) <= 100

    on(redis_url, story, max_queued=1000)


def test_interactive_goes_before_batch_of_the_same_owner_alone(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        later, now = Terms(owner="a", priority=Priority.BATCH), Terms(owner="a")
        await bench.store.submit("a-batch", a_request(), terms=later)
        await bench.store.submit("b-batch", a_request(), terms=Terms(owner="b", priority=Priority.BATCH))
        await bench.store.submit("a-now", a_request(), terms=now)
        assert [(await bench.store.get(job)).position for job in ("a-now", "b-batch", "a-batch")] == [1, 2, 3]
        assert await _claim_all(bench) == ["a-now", "b-batch", "a-batch"]

    on(redis_url, story)


def test_an_owner_that_was_away_brings_no_savings_along(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for number in range(20):
            await bench.store.submit(f"busy{number}", a_request(), terms=Terms(owner="busy", cost_ms=100))
        for _ in range(10):
            await bench.store.claim("worker", ANY)
        for number in range(10):
            await bench.store.submit(f"late{number}", a_request(), terms=Terms(owner="late", cost_ms=100))
        order = await _claim_all(bench)
        assert Counter(job_id[:4] for job_id in order[:10]) == {"busy": 5, "late": 5}

    on(redis_url, story)


@dataclass(frozen=True)
class Order:
    owner: str
    cost: int
    batch: bool


ORDERS = st.lists(
    st.builds(Order, st.sampled_from("abc"), st.sampled_from([1, 10, 70, 100, 1000]), st.booleans()),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(orders=ORDERS, weights=st.fixed_dictionaries(dict.fromkeys("abc", st.sampled_from([0.5, 1.0, 2.0, 7.0]))))
def test_a_place_in_the_queue_is_the_order_of_the_claims(
    redis_url: str, orders: list[Order], weights: dict[str, float]
) -> None:
    """Between any two claims the places that are told are the order in which the rest will be claimed."""

    async def story(bench: Bench) -> None:
        await bench.store._redis.flushall()
        for number, order in enumerate(orders):
            priority = Priority.BATCH if order.batch else Priority.INTERACTIVE
            terms = Terms(owner=order.owner, weight=weights[order.owner], cost_ms=order.cost, priority=priority)
            await bench.store.submit(f"job{number}", a_request(), terms=terms)
        left = {f"job{number}" for number in range(len(orders))}
        while left:
            places = {job: (await bench.store.get(job)).position for job in left}
            assert sorted(places.values()) == list(range(1, len(left) + 1))
            claim = await bench.store.claim("worker", ANY)
            assert isinstance(claim, Claim)
            assert places[claim.job_id] == 1
            left.remove(claim.job_id)
        await bench.store.check_integrity()

    on(redis_url, story)


def test_a_place_counts_the_jobs_of_the_same_model(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for number in range(5):
            await bench.store.submit(f"other{number}", a_request(model="other"))
        job = (await bench.store.submit("mine", a_request())).job
        assert job.position == 1

    on(redis_url, story)


def test_a_failed_attempt_waits_its_backoff_and_holds_up_nobody(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a")
        await bench.store.submit("b", a_request())
        await bench.store.fail(claim, BROKEN, retry=True, delay_s=60)
        assert (await bench.store.get("a")).state is JobState.QUEUED
        waits_ms = (
            int(await bench.store._redis.hget("tandem:job:a", "not_before"))
            - 1000 * (await bench.store._redis.time())[0]
        )
        assert 28_000 < waits_ms < 92_000  # half to one and a half times
        other = await bench.store.claim("worker", ANY)
        assert isinstance(other, Claim)
        assert other.job_id == "b"
        assert await bench.store.claim("worker", ANY) is Hold.UNFIT
        await bench.store._redis.hset("tandem:job:a", "not_before", 1)
        again = await bench.store.claim("worker", ANY)
        assert isinstance(again, Claim)
        assert (again.job_id, again.attempt) == ("a", 2)

    on(redis_url, story)


async def _lose(bench: Bench, job_id: str) -> None:
    await bench.store._redis.zadd("tandem:leases", {job_id: 1}, xx=True)
    assert await bench.store.reap() == 1


def test_the_last_attempt_of_a_job_that_lost_its_workers_is_made_alone(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for _ in range(2):
            claim = await bench.store.claim("w", ANY) or await bench.claimed("suspect")
            assert isinstance(claim, Claim)
            assert not claim.alone
            await _lose(bench, "suspect")
        await bench.store.submit("innocent", a_request())
        assert await bench.store.claim("busy", ANY, idle=False) is Hold.ALONE
        small = [Want(MODEL, 0, 1)]
        assert await bench.store.claim("elsewhere", small, idle=False) is Hold.UNFIT  # it couldn't draw it anyway
        claim = await bench.store.claim("idle", ANY, idle=True)
        assert isinstance(claim, Claim)
        assert (claim.job_id, claim.alone, claim.attempt) == ("suspect", True, 3)
        other = await bench.store.claim("busy", ANY, idle=False)
        assert isinstance(other, Claim)
        assert (other.job_id, other.alone) == ("innocent", False)
        await _lose(bench, "suspect")
        failed = await bench.store.get("suspect")
        assert (failed.state, failed.error and failed.error.code) == (JobState.FAILED, "worker_lost")
        assert [job.id for job in (await bench.store.jobs(dead=True)).jobs] == ["suspect"]

    on(redis_url, story)


def test_an_eta_falls_as_the_queue_drains(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for number in range(20):
            await bench.store.submit(f"job{number}", a_request(), terms=Terms(cost_ms=1000, alone_ms=500))
        last = (await bench.store.get("job19")).eta_s
        assert last == pytest.approx(20, rel=0.01)
        for _ in range(10):
            claim = await bench.store.claim("worker", ANY)
            assert isinstance(claim, Claim)
            await bench.succeed(claim)
        assert (await bench.store.get("job19")).eta_s == pytest.approx(10, rel=0.01)
        assert (await bench.store.get("job0")).eta_s is None

    on(redis_url, story)


def test_ten_owners_at_once_lose_no_count(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        async def one(owner: int) -> None:
            terms = Terms(owner=f"k{owner}", allowance=Allowance(max_unfinished=50))
            for number in range(10):
                await bench.store.submit(f"{owner}-{number}", a_request(), terms=terms)
                claim = await bench.store.claim("worker", ANY)
                assert isinstance(claim, Claim)
                await (bench.succeed(claim) if number % 2 else bench.store.cancelled(claim))

        await asyncio.gather(*map(one, range(10)))
        assert (await bench.store.backlog(MODEL)).depth == 0

    on(redis_url, story)


def test_work_for_another_model_puts_no_newcomer_behind_who_was_there(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for number in range(91):
            await bench.store.submit(f"heavy{number}", a_request(), terms=Terms(owner="heavy", cost_ms=100))
        for number in range(20):
            await bench.store.submit(f"b{number}", a_request(model="b"), terms=Terms(owner="other", cost_ms=100))
            assert await bench.store.claim("b", [Want("b", 0, 1 << 30)]) is not None
        for number in range(9):
            await bench.store.submit(f"light{number}", a_request(), terms=Terms(owner=f"k{number}", cost_ms=100))
        order = await _claim_all(bench)
        assert {f"light{number}" for number in range(9)} <= set(order[:20])

    on(redis_url, story)


def test_a_job_that_nobody_can_take_saves_its_owner_no_turns(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.store.submit("parked", a_request(model="absent"), terms=Terms(owner="heavy", cost_ms=100))
        for number in range(50):
            await bench.store.submit(f"busy{number}", a_request(), terms=Terms(owner="busy", cost_ms=100))
            assert await bench.store.claim("worker", ANY) is not None
        for number in range(30):
            await bench.store.submit(f"heavy{number}", a_request(), terms=Terms(owner="heavy", cost_ms=100))
        await bench.store.submit("light", a_request(), terms=Terms(owner="light", cost_ms=100))
        order = await _claim_all(bench)
        assert "light" in order[:4]

    on(redis_url, story)


def test_one_worker_at_a_time_makes_room_for_a_job_that_must_run_alone(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for _ in range(2):
            await (bench.store.claim("w", ANY) if await bench.store.queue_depth() else bench.claimed("suspect"))
            await _lose(bench, "suspect")
        for number in range(3):
            await bench.store.submit(f"other{number}", a_request())
        assert await bench.store.claim("first", ANY, idle=False) is Hold.ALONE
        for _ in range(3):
            claim = await bench.store.claim("second", ANY, idle=False)
            assert isinstance(claim, Claim)
            assert claim.job_id.startswith("other")
        assert await bench.store.claim("second", ANY, idle=False) is Hold.UNFIT
        assert await bench.store.claim("first", ANY, idle=False) is Hold.ALONE
        claim = await bench.store.claim("first", ANY, idle=True)
        assert isinstance(claim, Claim)
        assert (claim.job_id, claim.alone) == ("suspect", True)

    on(redis_url, story)


def test_a_claim_whose_answer_was_lost_is_the_same_claim_again(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for job_id in "ab":
            await bench.store.submit(job_id, a_request())
        args = ("worker", "number 1", 10_000, 600_000, 1, 1, 0, 0, -1, -1, 1, MODEL, 0, 1 << 30, 0, 0)
        first, again = [await bench.store._run("claim", *args) for _ in range(2)]
        assert first == again
        assert first[:3] == [b"a", 1, 1]
        other = await bench.store.claim("worker", ANY)
        assert isinstance(other, Claim)
        assert other.job_id == "b"

    on(redis_url, story)
