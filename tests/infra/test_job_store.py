"""One job after the other: what each method of the store does."""

import asyncio

import pytest
from support.jobs import ANY, BROKEN, CUT, IMAGE, MODEL, Bench, a_request, history, on, states

from serve.domain.jobs import JobState, Timings
from serve.domain.text import CacheReport, Tier
from serve.errors import JobNotFound, LeaseLost, QueueFull
from serve.jobs.store import Claim, Hold, Want


def test_a_job_from_submission_to_success(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        store = bench.store
        queued = (await store.submit("a", a_request(), truncated=[CUT])).job
        assert (queued.state, queued.position, queued.attempt, queued.steps) == (JobState.QUEUED, 1, 0, 4)
        assert (queued.request, queued.truncated, queued.cache) == (a_request(), (CUT,), None)
        claim = await store.claim("worker", [Want("other", 0, 4096), Want(MODEL, 0, 4096)])
        assert claim == Claim(job_id="a", attempt=1, fence=1, request=a_request(), truncated=(CUT,))
        assert claim.last
        assert await store.claim("worker", ANY) is None
        encoding = await store.get("a")
        assert (encoding.state, encoding.step, encoding.position) == (JobState.ENCODING, 0, None)
        assert await store.renew(claim, 3)
        running = await store.get("a")
        assert (running.state, running.step, running.position, running.attempt) == (JobState.RUNNING, 3, None, 1)
        assert await store.renew(claim, 4, JobState.STORING)
        assert await store.renew(claim, 2, JobState.ENCODING)  # nothing goes back
        storing = await store.get("a")
        assert (storing.state, storing.step) == (JobState.STORING, 4)
        await bench.succeed(claim)
        done = await store.get("a")
        assert (done.state, done.step, done.images, done.error) == (JobState.SUCCEEDED, 4, (IMAGE,), None)
        assert done.cache == CacheReport(redis=1)
        assert done.started_at is not None
        assert done.finished_at is not None
        assert done.created_at <= done.started_at <= done.finished_at
        assert done.timings.steps_s == 0.5
        assert done.timings.total_s == pytest.approx(done.finished_at - done.created_at, abs=1e-6)
        assert bench.metrics.value("tandem_jobs_total", state="succeeded") == 1
        assert bench.metrics.value("tandem_job_seconds") == 1

    on(redis_url, story)


def test_first_come_first_served_and_a_retry_keeps_its_place(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        first = await bench.claimed("a")
        for job_id in "bcd":
            await bench.store.submit(job_id, a_request())
        await bench.store.fail(first, BROKEN, retry=True)
        assert [(await bench.store.get(job_id)).position for job_id in "abcd"] == [1, 2, 3, 4]
        order = [await bench.store.claim("worker", ANY) for _ in "abcd"]
        assert [claim and claim.last for claim in order] == [False, False, False, True]
        assert [(claim.job_id, claim.attempt) for claim in order if claim] == [("a", 2), ("b", 1), ("c", 1), ("d", 1)]
        assert await bench.store.queue_depth() == 0

    on(redis_url, story)


def test_a_worker_claims_only_what_it_serves_however_deep_it_lies(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for number in range(230):
            await bench.store.submit(f"other{number}", a_request(model="other"))
        await bench.store.submit("mine", a_request())
        claim = await bench.store.claim("worker", ANY)
        assert claim is not None
        assert claim.job_id == "mine"
        assert await bench.store.claim("worker", ANY) is Hold.UNFIT

    on(redis_url, story, max_queued=1000)


def test_a_full_queue_refuses_and_logs_nothing(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for job_id in "ab":
            await bench.store.submit(job_id, a_request())
        with pytest.raises(QueueFull) as full:
            await bench.store.submit("c", a_request())
        assert full.value.retry_after_s is not None
        assert 1 <= full.value.retry_after_s <= 120
        with pytest.raises(JobNotFound):
            await bench.store.get("c")
        await bench.store.claim("worker", ANY)
        await bench.store.submit("c", a_request())
        assert await bench.store.queue_depth() == 2
        assert bench.metrics.value("tandem_queue_depth") == 2

    on(redis_url, story, max_queued=2)


def test_the_same_submission_again_is_the_same_job(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        answers = await asyncio.gather(*(bench.store.submit("a", a_request()) for _ in range(10)))
        assert len({answer.job for answer in answers}) == 1
        assert await bench.store.queue_depth() == 1

    on(redis_url, story)


@pytest.mark.parametrize("job_id", ["", "a b", "a\n", "../x", "é", "x" * 65, "a:b"])
def test_an_id_of_another_shape_reaches_no_key(redis_url: str, job_id: str) -> None:
    async def story(bench: Bench) -> None:
        with pytest.raises(JobNotFound):
            await bench.store.get(job_id)
        with pytest.raises(JobNotFound):
            await bench.store.cancel(job_id)
        with pytest.raises(JobNotFound):
            await history(bench.store, job_id)
        with pytest.raises(ValueError, match="a job id is"):
            await bench.store.submit(job_id, a_request())

    on(redis_url, story)


def test_attempts_run_out_and_a_failure_without_retry_is_final(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.store.fail(await bench.claimed("a"), BROKEN, retry=False)
        await bench.store.fail(await bench.claimed("b"), BROKEN, retry=True)
        assert (await bench.store.get("b")).error is None
        again = await bench.store.claim("worker", ANY)
        assert again is not None
        await bench.store.fail(again, BROKEN, retry=True)
        for job_id, attempt in (("a", 1), ("b", 2)):
            job = await bench.store.get(job_id)
            assert (job.state, job.attempt, job.error) == (JobState.FAILED, attempt, BROKEN)
        for dead in ("no", "yes"):  # the first failed by itself
            assert bench.metrics.value("tandem_jobs_total", state="failed", dead=dead) == 1

    on(redis_url, story, max_attempts=2)


def test_a_settlement_may_be_repeated_and_counts_once(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a")
        await bench.succeed(claim)
        await bench.succeed(claim)
        with pytest.raises(LeaseLost):
            await bench.store.fail(claim, BROKEN, retry=False)
        claim = await bench.claimed("b")
        await bench.store.fail(claim, BROKEN, retry=True)
        await bench.store.fail(claim, BROKEN, retry=True)
        assert (await bench.store.get("b")).position == 1
        assert states(await history(bench.store, "a"))[-1] == (JobState.SUCCEEDED, 4)
        assert bench.metrics.value("tandem_jobs_total") == 1

    on(redis_url, story)


def test_cancel_before_during_and_after(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        store = bench.store
        await store.submit("queued", a_request())
        assert (await store.cancel("queued")).state is JobState.CANCELLED
        assert (await store.cancel("queued")).state is JobState.CANCELLED
        claim = await bench.claimed("running")
        assert (await store.cancel("running")).state is JobState.ENCODING
        assert await store.renew(claim, 1) is False
        await store.cancelled(claim)
        assert (await store.get("running")).state is JobState.CANCELLED
        claim = await bench.claimed("done")
        await bench.succeed(claim)
        assert (await store.cancel("done")).state is JobState.SUCCEEDED
        with pytest.raises(JobNotFound):
            await store.cancel("never")
        assert bench.metrics.value("tandem_jobs_total", state="cancelled") == 2

    on(redis_url, story)


def test_the_cache_report_joins_what_happened_ahead_with_what_the_worker_saw(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.store.submit("a", a_request())
        await bench.store.note_ahead("a", {"u1": Tier.ENCODED, "u2": Tier.REDIS, "u3": Tier.REDIS})
        assert (await bench.store.get("a")).cache == CacheReport(redis=2, encoded=1)
        claim = await bench.store.claim("worker", ANY)
        assert claim is not None
        tiers = {"u1": Tier.REDIS, "u2": Tier.MEMORY, "u3": Tier.ENCODED, "u4": Tier.ENCODED}
        await bench.store.succeed(claim, images=[IMAGE], cache=tiers, timings=Timings())
        assert (await bench.store.get("a")).cache == CacheReport(memory=1, encoded=3)
        await bench.store.note_ahead("a", {"u2": Tier.ENCODED})
        await bench.store.note_ahead("never", {"u2": Tier.ENCODED})
        assert (await bench.store.get("a")).cache == CacheReport(memory=1, encoded=3)

    on(redis_url, story)


def test_of_many_workers_one_gets_each_job(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        others = [Bench(redis_url) for _ in range(4)]
        for number in range(40):
            await bench.store.submit(f"job{number}", a_request())
        claims = await asyncio.gather(*(others[number % 4].store.claim("w", ANY) for number in range(80)))
        assert sorted(claim.job_id for claim in claims if claim) == sorted(f"job{number}" for number in range(40))
        for other in others:
            await other.store.close()

    on(redis_url, story)
