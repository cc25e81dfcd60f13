"""What becomes of ended jobs: records that go when their time is over, dead letters, webhooks that are due."""

import asyncio

import pytest
from support.jobs import ANY, BROKEN, Bench, a_request, on

from serve.domain.jobs import JobState, WebhookState
from serve.embedded import EmbeddedRedis
from serve.errors import JobNotFound
from serve.jobs.store import Claim, Terms


async def _over(bench: Bench, *job_ids: str) -> None:
    """As if the records' time were over."""
    for job_id in job_ids:
        assert await bench.store._redis.zadd("tandem:ended", {job_id: 1}, xx=True, ch=True) == 1


def test_only_ended_jobs_whose_time_is_over_are_overdue_and_forgotten(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        store = bench.store
        for job_id in ("done", "fresh"):
            await bench.succeed(await bench.claimed(job_id))
        await store.submit("queued", a_request())
        assert await store.overdue() == []
        await _over(bench, "done")
        assert await store.overdue() == ["done"]
        assert await store.forget(["done", "fresh", "queued", "never"]) == 1
        assert await store.forget(["done"]) == 0
        with pytest.raises(JobNotFound):
            await store.get("done")
        assert [job.id for job in (await store.jobs()).jobs] == ["queued", "fresh"]

    on(redis_url, story)


def test_what_could_not_be_deleted_is_put_off_and_holds_up_no_other(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for job_id in ("stuck", "fine"):
            await bench.succeed(await bench.claimed(job_id))
        await _over(bench, "stuck", "fine")
        assert await bench.store.put_off(["stuck"], 30) == 1
        assert await bench.store.overdue(1) == ["fine"]
        assert await bench.store.put_off(["stuck"], 30) == 0
        assert (await bench.store.get("stuck")).state is JobState.SUCCEEDED

    on(redis_url, story)


def test_a_dead_letter_says_why_and_is_kept_for_longer(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.store.fail(await bench.claimed("dead"), BROKEN, retry=True)
        await bench.store.fail(await bench.claimed("mistaken"), BROKEN, retry=False)
        dead = (await bench.store.jobs(dead=True)).jobs
        assert [(job.id, job.state, job.error) for job in dead] == [("dead", JobState.FAILED, BROKEN)]
        kept_ms = await bench.store._redis.zscore("tandem:ended", "dead")
        other_ms = await bench.store._redis.zscore("tandem:ended", "mistaken")
        assert kept_ms - other_ms == pytest.approx((7 * 86400 - 3600) * 1000, abs=60_000)
        await _over(bench, "dead")
        await bench.store.forget(["dead"])
        assert (await bench.store.jobs(dead=True)).jobs == ()

    on(redis_url, story, max_attempts=1)


@pytest.mark.parametrize("end", ["succeed", "fail", "cancel", "expire"])
def test_every_end_of_a_job_is_to_be_told_once(redis_url: str, end: str) -> None:
    async def story(bench: Bench) -> None:
        store = bench.store
        await store.submit("a", a_request(), terms=Terms(webhook="https://example.com/done"))
        await store.submit("quiet", a_request())
        assert (await store.get("a")).webhook_state is None
        async with store.webhooks_changed() as changed:
            changed.clear()
            if end == "cancel":
                await store.cancel("a")
            elif end == "expire":
                await store._redis.zadd("tandem:deadlines", {"a": 1})
                assert await store.reap() == 1
            else:
                claim = await store.claim("worker", ANY)
                assert isinstance(claim, Claim)
                await (bench.succeed(claim) if end == "succeed" else store.fail(claim, BROKEN, retry=False))
            async with asyncio.timeout(5):
                await changed.wait()
        job = await store.get("a")
        assert (job.webhook, job.webhook_state) == ("https://example.com/done", WebhookState.PENDING)
        assert await store.due_webhooks(lease_s=60) == ["a"]
        assert await store.due_webhooks(lease_s=60) == []
        assert await store.webhook_again("a", delay_s=0.001) == 0  # nobody has called yet
        while not await store.due_webhooks(lease_s=60):
            await store.ping()
        assert await store.webhook_called("a", lease_s=60) == 1
        assert await store.webhook_again("a", delay_s=0.001) == 1
        while not (due := await store.due_webhooks(lease_s=60)):
            await store.ping()
        assert due == ["a"]
        await store.webhook_done("a", delivered=False)
        assert (await store.get("a")).webhook_state is WebhookState.FAILED
        assert await store.webhook_again("a", delay_s=1) == 0

    on(redis_url, story)


def test_a_webhook_goes_with_its_record(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.store.submit("a", a_request(), terms=Terms(webhook="https://example.com/done"))
        await bench.store.cancel("a")
        await _over(bench, "a")
        await bench.store.forget(["a"])
        assert await bench.store.due_webhooks(lease_s=1) == []

    on(redis_url, story)


def test_a_redis_that_may_lose_jobs_is_told(jobs_redis: EmbeddedRedis) -> None:
    async def story(bench: Bench) -> None:
        assert await bench.store.doubts() == ()
        redis = bench.store._redis
        await redis.config_set("maxmemory-policy", "allkeys-lru")
        assert await bench.store.doubts() == ("maxmemory-policy is allkeys-lru, not noeviction",)

    on(jobs_redis.url, story)


def test_the_servers_rules_are_found_by_the_operators_commands(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        operator = Bench(redis_url, max_attempts=9)
        assert (await operator.store.told_rules()).max_attempts == 9
        await bench.store.tell_rules()
        told = await operator.store.told_rules()
        assert (told.max_attempts, told.result_ttl_s) == (2, 77.0)
        assert told.redis_url is not None
        await operator.store.close()

    on(redis_url, story, max_attempts=2, result_ttl_s=77.0)
