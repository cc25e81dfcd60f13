"""Two releases at one job Redis, as in a roll-out: nothing is lost, and nothing is drawn without what was asked for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis
from support.jobs import ANY, MODEL, Bench, a_request, on

from serve.domain.jobs import JobState
from serve.domain.text import Syntax
from serve.embedded import EmbeddedRedis
from serve.errors import InvalidRequest
from serve.jobs import reading
from serve.jobs.calls import started_now
from serve.jobs.claims import UNREADABLE
from serve.jobs.schema import Schema
from serve.jobs.store import Claim, Hold, Want
from serve.jobs.terms import REPORT, WorkerReport
from serve.results.local import LocalStore
from serve.retry import retry

NEWER = Schema(2, fields={"tiny_vae": 2}, values={("prompt_syntax", Syntax.PLAIN): 2})
"""A release for which these came with schema 2. To the other one, of schema 1, both are unknown."""


def releases(url: str, **settings: object) -> tuple[Bench, Bench]:
    """The older and the newer one."""
    return Bench(url, schema=Schema(), **settings), Bench(url, schema=NEWER, **settings)


async def written_by_the_newer(url: str, newer: Bench) -> None:
    """Three orders; the third has a field and a value that the older release has never heard of."""
    await newer.store.submit("plain", a_request())
    await newer.store.submit("tiny", a_request(tiny_vae=True))
    await newer.store.submit("foreign", a_request(prompt_syntax=Syntax.PLAIN))
    with Redis.from_url(url) as raw:
        told = json.loads(raw.hget("tandem:job:foreign", "request") or b"")
        raw.hset("tandem:job:foreign", "request", json.dumps(told | {"prompt_syntax": "klingon", "tiling": True}))


def test_what_only_the_newer_release_can_draw_waits_for_it(redis_url: str) -> None:
    async def story(_: Bench) -> None:
        older, newer = releases(redis_url)
        await written_by_the_newer(redis_url, newer)
        first = await older.store.claim("old", ANY)
        assert isinstance(first, Claim)
        assert first.job_id == "plain"
        assert await older.store.claim("old", ANY) is Hold.UNFIT
        for job_id in ("tiny", "foreign"):
            waiting = await older.store.get(job_id)
            assert (waiting.state, waiting.attempt) == (JobState.QUEUED, 0)
        await older.store.release(first)
        with Redis.from_url(redis_url) as raw:
            assert [raw.hget(f"tandem:job:{name}", "schema") for name in ("plain", "tiny")] == [b"1", b"2"]
        taken = [await newer.store.claim("new", ANY) for _ in range(2)]
        assert [claim.job_id for claim in taken if isinstance(claim, Claim)] == ["plain", "tiny"]
        for claim in taken:
            assert isinstance(claim, Claim)
            await newer.succeed(claim)
        assert (await older.store.cancel("foreign")).state is JobState.CANCELLED
        for each in (older, newer):
            await each.store.close()

    on(redis_url, story)


def test_each_worker_gets_the_oldest_order_that_its_release_reads(redis_server: EmbeddedRedis) -> None:
    """Three releases, orders of each, and workers of each in any order."""
    known = Schema(3, fields={"tiny_vae": 2, "step_cache": 3})
    uses: dict[int, dict[str, Any]] = {1: {}, 2: {"tiny_vae": True}, 3: {"step_cache": 0.1}}
    release = st.integers(1, 3)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(release, max_size=6), st.lists(release, max_size=10))
    def holds(orders: list[int], workers: list[int]) -> None:
        async def story(_: Bench) -> None:
            benches = {newest: Bench(redis_server.url, schema=replace(known, newest=newest)) for newest in uses}
            await benches[3].store._redis.flushall()
            for number, schema in enumerate(orders):
                await benches[3].store.submit(f"job{number}", a_request(**uses[schema]))
            left = dict(enumerate(orders))
            for newest in workers:
                claim = await benches[newest].store.claim("worker", ANY)
                readable = [number for number, schema in left.items() if schema <= newest]
                if not readable:
                    assert claim is (Hold.UNFIT if left else None)
                    continue
                assert isinstance(claim, Claim)
                assert claim.job_id == f"job{readable[0]}"
                assert claim.request == a_request(**uses[left.pop(readable[0])])
            for each in benches.values():
                await each.store.close()

        on(redis_server.url, story)

    holds()


def test_an_older_order_is_drawn_by_a_newer_worker(redis_url: str) -> None:
    async def story(_: Bench) -> None:
        older, newer = releases(redis_url)
        await older.store.submit("a", a_request())
        with Redis.from_url(redis_url) as raw:
            assert raw.hdel("tandem:job:a", "schema") == 1  # a release that knew of none
            told = json.loads(raw.hget("tandem:job:a", "request") or b"")
            del told["tiny_vae"]
            raw.hset("tandem:job:a", "request", json.dumps(told))
        claim = await newer.store.claim("new", ANY)
        assert isinstance(claim, Claim)
        assert claim.request == a_request()
        await newer.succeed(claim)
        assert (await older.store.get("a")).state is JobState.SUCCEEDED
        for each in (older, newer):
            await each.store.close()

    on(redis_url, story)


def test_a_client_may_ask_either_release(redis_url: str) -> None:
    """Each question goes to another ingress than the one before, as behind a load balancer."""

    async def story(_: Bench) -> None:
        older, newer = releases(redis_url)
        await newer.store.submit("a", a_request(tiny_vae=True))
        for asked in (older, newer, older):
            assert (await asked.store.get("a")).state is JobState.QUEUED
        claim = await newer.store.claim("new", ANY)
        assert isinstance(claim, Claim)
        await newer.store.renew(claim, 2)
        heard: list[str] = []
        for asked in (older, newer, older):
            assert (await asked.store.get("a")).step == 2
            events, _ended = await asked.store.events_after("a", heard[-1] if heard else None)
            heard += [event.id for event in events]
        assert len(heard) == 3  # queued, encoding, running: each once
        await newer.succeed(claim)
        for asked in (older, newer):
            done = await asked.store.get("a")
            assert (done.state, done.request.tiny_vae, len(done.images)) == (JobState.SUCCEEDED, True, 1)
        for each in (older, newer):
            await each.store.close()

    on(redis_url, story)


def test_what_is_not_understood_of_an_order_is_said_to_be_left_out(redis_url: str, tmp_path: Path) -> None:
    async def story(_: Bench) -> None:
        older, newer = releases(redis_url)
        await written_by_the_newer(redis_url, newer)
        told = {job.id: job for job in (await older.store.jobs()).jobs}
        assert {name: [note.code for note in job.notes] for name, job in told.items()} == {
            "plain": [],
            "tiny": ["newer_release"],
            "foreign": ["newer_release"],
        }
        assert told["foreign"].request == a_request()
        for job_id in told:
            await older.store.cancel(job_id)
        with pytest.raises(InvalidRequest, match="newer release"):
            await retry(older.store, LocalStore(tmp_path), "foreign")
        for each in (older, newer):
            await each.store.close()

    on(redis_url, story)


def test_an_older_command_goes_by_a_newer_server_s_settings(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.store.tell_rules()
        with Redis.from_url(redis_url) as raw:
            told = json.loads(raw.get("tandem:rules") or b"")
            raw.set("tandem:rules", json.dumps(told | {"max_queued": 7, "of_tomorrow": {"x": 1}}))
        rules = await bench.store.told_rules()
        assert (rules.max_queued, rules.lease_s) == (7, 33.0)
        assert rules.redis_url is not None

    on(redis_url, story, lease_s=33.0)


def test_a_call_of_a_newer_release_is_found_by_an_older_one(redis_url: str) -> None:
    """A1111's `skip` and `progress` may come to any ingress."""

    async def story(bench: Bench) -> None:
        await bench.store.begin_call("ada", started_now("draw", rounds=2, stages=1), 60.0)
        with Redis.from_url(redis_url) as raw:
            (key,) = raw.keys("tandem:call:ada:*")
            told = json.loads(raw.hget(key, "call") or b"")
            raw.hset(key, "call", json.dumps(told | {"of": "tomorrow"}))
        found = await bench.store.stop_call("ada", "draw")
        assert found is not None
        assert (found.rounds, found.interrupted) == (2, True)

    on(redis_url, story)


def test_an_older_release_hears_what_newer_workers_tell(redis_url: str) -> None:
    """Their reports, and what they say beside a result, may have a form that it has never seen."""

    async def story(bench: Bench) -> None:
        known = WorkerReport(name="w", model=MODEL, placement="p", max_pixels=1, max_rows=1, batch=1, vae_factor=8)
        await bench.store.report(known)
        claim = await bench.claimed()
        with Redis.from_url(redis_url) as raw:
            strange = json.loads(REPORT.dump_json(known)) | {"name": "x", "rung": "a rung of tomorrow"}
            raw.hset("tandem:workers", "x", json.dumps(strange))
            raw.zadd("tandem:alive", {"x": 2**52})
            raw.hset("tandem:job:a", mapping={"ahead": '{"u": "a tier of tomorrow"}', "memory": '{"rung": "new"}'})
        assert (await bench.store.crew(MODEL)).reports == (known,)
        await bench.store.submit("b", a_request())
        await bench.succeed(claim)
        done = await bench.store.get("a")
        assert (done.state, done.memory) == (JobState.SUCCEEDED, None)
        await bench.store.cancel("b")

    on(redis_url, story)


def test_an_order_that_nobody_can_read_ends_and_costs_no_lease(redis_url: str) -> None:
    """Damage, or a release that broke the rules: three tries, with others in between, and a reason."""

    async def story(bench: Bench) -> None:
        await bench.store.submit("a", a_request())
        await bench.store.submit("b", a_request())
        with Redis.from_url(redis_url) as raw:
            raw.hset("tandem:job:a", "request", '{"model": "shapes", "prompt": "of a circle"}')
            for _ in range(3):
                assert await bench.store.claim("worker", [Want(MODEL, 0, 2**31)]) is Hold.UNFIT
                raw.hdel("tandem:job:a", "not_before")
            assert raw.hget("tandem:job:a", "state") == b"failed"
            assert raw.hget("tandem:job:a", "lost") == b"0"
            assert UNREADABLE.code in (raw.hget("tandem:job:a", "error") or b"").decode()
            raw.hset("tandem:job:a", "request", reading.REQUEST.dump_json(a_request()))
        claim = await bench.store.claim("worker", ANY)
        assert isinstance(claim, Claim)
        assert claim.job_id == "b"
        await bench.succeed(claim)

    on(redis_url, story, retry_backoff_s=60.0)
