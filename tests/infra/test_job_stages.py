"""The stages of a job as its record tells them."""

import dataclasses
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from support.house import House
from support.jobs import ANY, IMAGE, Bench, a_request, on

from serve.domain.jobs import JobError, JobState, Timings
from serve.domain.orders import Arrival
from serve.domain.text import Tier
from serve.jobs import reading, records
from serve.jobs.store import Terms
from serve.stages import explained, stages

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def house(redis_url: str, tmp_path: Path) -> AsyncIterator[House]:
    house = House(redis_url, tmp_path)
    yield house
    await house.close()


def a_moment_later(raw: Redis) -> None:
    """The store's clock goes on by a few of the milliseconds that it counts."""
    then = raw.time()
    while raw.time() < (then[0], then[1] + 3000):
        pass


def written(raw: Redis, **fields: Any) -> None:
    raw.hset("tandem:job:a", mapping=fields)


def test_the_record_and_the_settlement_make_one_chain(redis_url: str) -> None:
    raw = Redis.from_url(redis_url)

    async def story(bench: Bench) -> None:
        arrival = Arrival(at=time.monotonic() - 0.5, trace=TRACE)
        await bench.store.submit("a", a_request(), terms=Terms(arrival=arrival))
        await bench.store.note_ahead("a", {"u": Tier.ENCODED}, 0.25)
        waiting = (await bench.store.get("a")).timings
        assert waiting.admission_s == pytest.approx(0.5, abs=0.1)
        assert (waiting.ahead_s, waiting.queued_s, waiting.retried_s, waiting.total_s) == (0.25, None, None, None)
        claim = await bench.store.claim("worker", ANY)
        assert claim is not None
        assert claim.trace == TRACE
        own = Timings(claim_s=0.001, text_s=0.1, text_from=Tier.REDIS, steps_s=0.5, put_s=0.05, batch_images=1.5)
        await bench.store.succeed(claim, images=[IMAGE], cache={}, timings=own)
        start = 1_700_000_000_000
        times = {"created": start, "waiting": start, "started": start + 100, "finished": start + 800}
        written(raw, **times, told=start + 803, admission="12.500")
        timings = (await bench.store.get("a")).timings
        assert timings == dataclasses.replace(
            own, admission_s=0.0125, queued_s=0.1, total_s=0.8, told_s=0.003, ahead_s=0.25
        )
        assert explained(timings) == pytest.approx((0.0125 + 0.1 + 0.651 + 0.003) / (0.0125 + 0.8 + 0.003))

    on(redis_url, story)


def test_earlier_attempts_are_a_stage_of_their_own(redis_url: str) -> None:
    raw = Redis.from_url(redis_url)

    async def story(bench: Bench) -> None:
        claim = await bench.claimed()
        assert claim.retried_s is None
        a_moment_later(raw)
        await bench.store.fail(claim, JobError(code="broken", message="it broke"), retry=True)
        again = (await bench.store.get("a")).timings
        assert again.queued_s is None, "it waits again"
        assert again.retried_s is not None
        assert again.retried_s >= 0.003
        a_moment_later(raw)
        second = await bench.store.claim("worker", ANY)
        assert second is not None
        assert second.retried_s == again.retried_s
        job = await bench.store.get("a")
        assert job.started_at is not None
        assert job.timings.queued_s == second.queued_s
        assert second.queued_s >= 0.003
        assert again.retried_s + second.queued_s == pytest.approx(job.started_at - job.created_at, abs=1e-6)

    on(redis_url, story)


def test_a_record_of_the_version_before_is_read(redis_url: str) -> None:
    """Its settlement told other stages, and nothing of the ways between."""
    raw = Redis.from_url(redis_url)

    async def story(bench: Bench) -> None:
        await bench.succeed(await bench.claimed())
        old = {"queued_s": None, "text_s": 0.1, "denoise_s": 1.2, "decode_s": 0.3, "store_s": 0.04, "total_s": None}
        written(raw, timings=json.dumps(old))
        job = await bench.store.get("a")
        assert job.state is JobState.SUCCEEDED
        assert (job.timings.text_s, job.timings.decode_s) == (0.1, 0.3)
        assert (job.timings.steps_s, job.timings.put_s, job.timings.admission_s) == (None, None, None)
        assert {"queued", "text", "decode"} == {name for name, _ in stages(job.timings)}

    on(redis_url, story)


@pytest.mark.parametrize(("apart_s", "least_s", "most_s"), [(3600, 0.2, 0.3), (-3600, 0.0, 0.0), (0.1, 0.09, 0.21)])
def test_clocks_that_differ_make_no_stage_longer_than_its_call(apart_s: float, least_s: float, most_s: float) -> None:
    """The store says when it gave the job away, on a clock of its own."""
    started = round(1000 * (time.time() - apart_s))
    request = reading.REQUEST.dump_json(a_request())
    reply = [b"a", 1, 1, 0, 0, b"1", b"1", str(started).encode(), None, b"1", request, b"[]", None]
    claim = records.claim(reply, time.monotonic() - 0.2)
    assert least_s <= claim.claim_s <= most_s


@pytest.mark.anyio
async def test_a_drawn_job_has_every_stage_and_they_are_counted(house: House) -> None:
    async with house.worker():
        await house.submit("a", num_images=2)
        timings = (await house.ended("a")).timings
    told = dict(stages(timings))
    assert told.keys() >= {"queued", "claim", "text", "batch", "steps", "decode_wait", "decode", "compress", "put"}
    assert min(told.values()) >= 0, told
    assert timings.text_from is Tier.ENCODED
    assert timings.batch_images is not None
    assert 1 <= timings.batch_images <= 2
    share = explained(timings)
    assert share is not None
    # The settlement's round trip is in no stage, and the store counts in milliseconds.
    total_s = timings.total_s or 0.0
    assert -0.003 / total_s <= 1 - share <= 0.03 + 0.01 / total_s, told
    for stage in told:
        if stage != "told":
            assert house.metrics.value("tandem_stage_seconds", stage=stage) == 1
            assert house.metrics.value("tandem_stage_spent_seconds_total", stage=stage) >= 0
    assert house.metrics.value("tandem_text_wait_seconds", tier=Tier.ENCODED) == 1


@pytest.mark.anyio
async def test_what_an_earlier_attempt_had_stored_is_no_drawing(house: House) -> None:
    """Its worker died before it could say so."""
    async with house.worker():
        await house.submit("a")
        await house.ended("a")
    await house.submit("b")
    first = await house.jobs.claim("dies", [records.Want(house.model.name, 0, 1 << 20)])
    assert isinstance(first, records.Claim)
    for key in ("0.png", "manifest.json"):
        data = await house.results.get(f"a/{key}")
        await house.results.put(f"b/{key}", data.replace(b"a/", b"b/"), "image/png")
    await house.jobs.fail(first, JobError(code="broken", message="it broke"), retry=True)
    async with house.worker():
        timings = (await house.ended("b")).timings
    assert timings.put_s is not None
    assert timings.steps_s is None
