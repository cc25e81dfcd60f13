"""Which job a worker gets: the wants of a claim against the queue."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.jobs import ANY, BROKEN, MODEL, Bench, a_request, on

from serve.embedded import EmbeddedRedis
from serve.errors import QueueFull
from serve.jobs.store import Claim, Hold, Want
from serve.placements import Placement
from serve.settings.pools import DiffusionSettings
from serve.wants import wants_of

SIDES = (8, 16, 24, 64)
EVERYTHING = 2**31
LONG_S = 600.0
"""Longer than a test takes: only what was made to have waited has waited."""


@dataclass(frozen=True)
class Queued:
    model: str
    side: int
    waited: bool
    overdue: bool = False

    @property
    def pixels(self) -> int:
        return self.side**2

    def satisfies(self, want: Want) -> bool:
        fits = self.model == want.model and want.above < self.pixels <= want.upto
        return fits and not self.overdue and (self.waited or not want.waited_s)


JOBS = st.builds(Queued, st.sampled_from(["shapes", "other"]), st.sampled_from(SIDES), st.booleans(), st.booleans())
BOUNDS = st.sampled_from([0, 64, 256, 300, 576, 4096])
WANTS = st.builds(Want, st.sampled_from(["shapes", "other"]), BOUNDS, BOUNDS, st.sampled_from([0.0, LONG_S]))


async def queue(bench: Bench, jobs: Sequence[Queued]) -> None:
    for number, job in enumerate(jobs):
        job_id = f"job{number}"
        await bench.store.submit(job_id, a_request(model=job.model, side=job.side))
        if job.waited:
            await bench.store._redis.hset(f"tandem:job:{job_id}", "waiting", 1)
        if job.overdue:
            await bench.store._redis.zadd("tandem:deadlines", {job_id: 1})


def test_a_claim_is_the_oldest_job_of_the_first_want_that_any_satisfies(redis_server: EmbeddedRedis) -> None:
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(JOBS, max_size=12), st.lists(WANTS, max_size=4))
    def holds(jobs: list[Queued], wants: list[Want]) -> None:
        async def story(bench: Bench) -> None:
            await bench.store._redis.flushall()
            await queue(bench, jobs)
            left = dict(enumerate(jobs))
            while True:
                claim = await bench.store.claim("worker", wants)
                ranked = (
                    (rank, number)
                    for rank, want in enumerate(wants)
                    for number, job in left.items()
                    if job.satisfies(want)
                )
                expected = min(ranked, default=None)
                assert (claim.job_id if isinstance(claim, Claim) else None) == (expected and f"job{expected[1]}")
                if expected is None:
                    break  # so no job is left that any want covers
                del left[expected[1]]

        on(redis_server.url, story)

    holds()


def test_large_only_work_goes_first_and_smaller_work_fills_in(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        small, large = Want(MODEL, 0, 256), Want(MODEL, 256, 4096)
        for job_id, side in (("s1", 8), ("l1", 64), ("s2", 16), ("l2", 24)):
            await bench.store.submit(job_id, a_request(side=side))
        claims = [await bench.store.claim("large card", [large, small]) for _ in range(3)]
        assert [claim and claim.job_id for claim in claims] == ["l1", "l2", "s1"]
        assert await bench.store.claim("large card", [large]) is Hold.UNFIT
        last = await bench.store.claim("small card", [small])
        assert last is not None
        assert last.job_id == "s2"

    on(redis_url, story)


@pytest.mark.parametrize("rows", [0, 4])
def test_small_work_does_not_starve_beside_a_steady_stream_of_large(redis_url: str, rows: int) -> None:
    async def story(bench: Bench) -> None:
        own = DiffusionSettings(max_batch_size=4)
        card = Placement(name="l", model=MODEL, gpu_class=None, settings=own, max_pixels=4096, smaller=256)
        wants = wants_of(card, rows, 4)
        for job_id, side in (("s1", 8), ("s2", 8), ("l1", 64), ("l2", 64)):
            await bench.store.submit(job_id, a_request(side=side))
        await _waited(bench, 10, "s1", "s2", "l1", "l2")
        first = await bench.store.claim("large card", wants)
        assert first is not None
        assert first.job_id == "l1"
        await _waited(bench, 40, "s1", "s2")
        claims = [await bench.store.claim("large card", wants) for _ in range(3)]
        assert [claim and claim.job_id for claim in claims] == ["s1", "s2", "l2"]

    on(redis_url, story)


def test_a_full_card_leaves_large_only_work_to_its_sibling(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        own = DiffusionSettings(max_batch_size=4)
        card = Placement(name="l", model=MODEL, gpu_class=None, settings=own, max_pixels=4096, smaller=256)
        await bench.store.submit("l1", a_request(side=64))
        assert await bench.store.claim("full", wants_of(card, 4, 4)) is Hold.UNFIT
        assert await bench.store.claim("idle", wants_of(card, 0, 4))

    on(redis_url, story)


def test_an_id_whose_record_was_deleted_stops_no_claim_and_is_forgotten(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for job_id in ("gone", "lost"):
            await bench.store.submit(job_id, a_request())
        await bench.store._redis.delete("tandem:job:gone")
        held = await bench.store.claim("worker", ANY)
        assert held is not None
        assert held.job_id == "lost"
        await bench.store.submit("a", a_request())
        await bench.store._redis.delete("tandem:job:lost")
        await bench.store._redis.zadd("tandem:leases", {"lost": 1})
        with pytest.raises(QueueFull):
            await bench.store.submit("b", a_request())
        await bench.store._redis.zadd("tandem:deadlines", {"gone": 1})
        assert await bench.store.reap() == 2
        await bench.store.check_integrity()
        again = await bench.store.claim("worker", ANY)
        assert again is not None
        assert again.job_id == "a"

    on(redis_url, story, max_queued=2)


def test_a_want_that_waits_leaves_the_job_to_others_and_then_takes_it(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        patient = [Want(MODEL, 0, EVERYTHING, 0.25)]
        await bench.store.submit("a", a_request())
        assert await bench.store.claim("busy", patient) is Hold.UNFIT
        await asyncio.wait_for(_claimed(bench, patient), 5)
        job = await bench.store.get("a")
        assert job.started_at is not None
        assert job.started_at - job.created_at >= 0.25

    on(redis_url, story)


@pytest.mark.parametrize("back", ["retry", "release"])
def test_a_job_that_comes_back_has_not_waited_and_keeps_its_place(redis_url: str, back: str) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a")
        await bench.store._redis.hset("tandem:job:a", "waiting", 1)
        await bench.store.submit("b", a_request())
        if back == "retry":
            await bench.store.fail(claim, BROKEN, retry=True)
        else:
            await bench.store.release(claim)
        assert await bench.store.claim("busy", [Want(MODEL, 0, EVERYTHING, LONG_S)]) is Hold.UNFIT
        again = await bench.store.claim("idle", ANY)
        assert again is not None
        assert again.job_id == "a"

    on(redis_url, story)


async def _waited(bench: Bench, seconds: float, *job_ids: str) -> None:
    """As if they had waited for so long since they joined the queue."""
    now_s, _ = await bench.store._redis.time()
    for job_id in job_ids:
        await bench.store._redis.hset(f"tandem:job:{job_id}", "waiting", round(1000 * (now_s - seconds)))


async def _claimed(bench: Bench, wants: Sequence[Want]) -> None:
    while await bench.store.claim("busy", wants) is Hold.UNFIT:
        pass
