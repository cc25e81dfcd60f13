"""Jobs that ran out of memory: marked, claimed by larger cards, told of, and stranded by nobody."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from support.house import House, a_runner, open_house, until
from support.jobs import BROKEN, MODEL, Bench, a_request, on

from serve.diffusion.runner import Runner
from serve.diffusion.scheduler import Row
from serve.domain.jobs import JobState, MemoryReport, Relief
from serve.domain.text import EncodeUnit
from serve.encoders.cache import Fetched
from serve.errors import OutOfMemory
from serve.jobs.records import Marks
from serve.jobs.store import Claim, Hold, Want
from serve.placements import Placement
from serve.relief import AGED_S
from serve.rungs import Rung

pytestmark = pytest.mark.anyio

MARKED = MemoryReport(retries=2, relief=(Relief("step", "int8"), Relief("job", "another_card")), above_mb=4000)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def house(redis_url: str, tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(redis_url, tmp_path) as house:
        yield house


def want(memory_mb: int) -> list[Want]:
    return [Want(MODEL, 0, 2**31, memory_mb=memory_mb)]


def test_a_marked_job_is_for_more_memory(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.store.fail(await bench.claimed("a"), BROKEN, retry=True, memory=MARKED)
        assert (await bench.store.get("a")).memory == MARKED
        for memory_mb in (0, 3999, 4000, 4002, 4200):
            assert await bench.store.claim("small", want(memory_mb)) is Hold.UNFIT
        assert (await bench.store.get("a")).position == 1
        claim = await bench.store.claim("large", want(4201))
        assert claim is not None
        assert not isinstance(claim, Hold)
        assert (claim.job_id, claim.memory) == ("a", MARKED)

    on(redis_url, story)


def test_others_pass_a_marked_job_by(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.store.fail(await bench.claimed("a"), BROKEN, retry=True, memory=MARKED)
        await bench.store.submit("b", a_request())
        claims = [await bench.store.claim("small", want(4000)), await bench.store.claim("large", want(11000))]
        assert [claim and not isinstance(claim, Hold) and claim.job_id for claim in claims] == ["b", "a"]

    on(redis_url, story)


def test_a_mark_only_ever_rises_and_other_retries_keep_it(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.store.fail(await bench.claimed("a"), BROKEN, retry=True, memory=MARKED)
        claim = await bench.store.claim("large", want(11000))
        assert claim is not None
        assert not isinstance(claim, Hold)
        await bench.store.fail(claim, BROKEN, retry=True)
        assert await bench.store.claim("small", want(4000)) is Hold.UNFIT
        again = await bench.store.claim("large", want(11000))
        assert again is not None
        assert not isinstance(again, Hold)
        await bench.store.release(again)
        assert await bench.store.claim("small", want(4000)) is Hold.UNFIT

    on(redis_url, story)


def test_a_mark_that_nobody_satisfies_counts_no_more_in_the_end(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.store.fail(await bench.claimed("a"), BROKEN, retry=True, memory=MARKED)
        assert await bench.store.claim("small", want(4000), marks=Marks(rest_s=AGED_S)) is Hold.UNFIT
        now_s, _ = await bench.store._redis.time()
        await bench.store._redis.hset("tandem:job:a", "waiting", round(1000 * (now_s - AGED_S)))
        assert await bench.store.claim("small", want(4000)) is Hold.UNFIT, "somebody larger lives"
        claim = await bench.store.claim("small", want(4000), marks=Marks(rest_s=AGED_S))
        assert claim is not None
        assert not isinstance(claim, Hold)
        assert claim.job_id == "a"

    on(redis_url, story)


def test_how_long_a_mark_counts_depends_on_the_jobs_pixels(redis_url: str) -> None:
    """Somebody larger lives for the smallest one, is to come for the next, and nobody is for the last."""
    marks = Marks(alive=16**2, coming=32**2, coming_s=100.0, rest_s=AGED_S)

    async def story(bench: Bench) -> None:
        sides = {"living": 16, "coming": 32, "nobody": 48}
        for job_id, side in sides.items():
            await bench.store.fail(await bench.claimed(job_id, side=side), BROKEN, retry=True, memory=MARKED)
        taken = []
        for waited_s in (AGED_S - 5, AGED_S, 100.0, 10_000.0):
            now_s, _ = await bench.store._redis.time()
            for job_id in sides:
                await bench.store._redis.hset(f"tandem:job:{job_id}", "waiting", round(1000 * (now_s - waited_s)))
            claim = await bench.store.claim("small", want(4000), marks=marks)
            taken.append(claim.job_id if isinstance(claim, Claim) else None)
        assert taken == [None, "nobody", "coming", None]

    on(redis_url, story)


class Full(Runner):
    """A card without memory for images of more than so many pixels."""

    def __init__(self, runner: Runner, pixels: int) -> None:
        super().__init__(runner.family)
        self.pixels = pixels
        self.refused = 0

    def step(self, rows: Sequence[Row], most: int | None = None) -> dict[Row, Exception]:
        height, width = rows[0].group.shape
        if height * width * self.family.vae.scale_factor**2 > self.pixels:
            self.refused += 1
            raise OutOfMemory("the denoiser: the device ran out of memory")
        return super().step(rows, most)


def cards(house: House) -> tuple[Placement, Placement]:
    """Of 4 and of 11 GB, as the settings have them: both are said to hold the same sizes."""
    small, large = (
        dataclasses.replace(house.a_placement(), name=name, memory_bytes=memory)
        for name, memory in (("small", 4 * 10**9), ("large", 11 * 10**9))
    )
    return small, large


async def test_what_one_card_has_no_memory_for_another_draws(house: House) -> None:
    """The small one lives on, and draws what it holds; the job tells where it has been."""
    small, large = house.placements = cards(house)
    full = Full(a_runner(house.model), 128 * 128)
    house.placement = small
    async with house.worker("small", full) as worker:
        await house.submit("wide", width=192, height=128)
        await house.submit("narrow", seed=2)
        job = await house.reaches("wide", lambda job: job.state is JobState.QUEUED and job.attempt == 1)
        assert job.memory is not None
        assert job.memory.above_mb == 4000
        assert (await house.ended("narrow")).state is JobState.SUCCEEDED
        refused = full.refused
        house.placement = large
        async with house.worker("large"):
            job = await house.ended("wide")
        assert full.refused == refused, "the small card tried once more"
        assert worker.ailment is None
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
    assert job.memory == MemoryReport(
        rung=Rung.RESIDENT,
        retries=2,
        relief=(Relief("step", "fewer_lanes"), Relief("job", "another_card")),
        above_mb=4000,
    )


async def test_a_card_on_a_better_rung_draws_it_although_it_takes_smaller_images(house: House) -> None:
    small, large = cards(house)
    large = dataclasses.replace(large, max_pixels=small.max_pixels // 4)
    house.placement, house.placements = small, (small, large)
    async with house.worker("small", Full(a_runner(house.model), 0)):
        await house.submit("a")
        await house.reaches("a", lambda job: job.state is JobState.QUEUED and job.attempt == 1)
        house.placement = large
        async with house.worker("large"):
            job = await house.ended("a")
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
    assert job.memory is not None
    assert job.memory.above_mb == 4000


async def test_an_encoder_without_memory_says_nothing_of_this_card(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is tried again, by anybody, and nothing is told of its memory."""
    seen: list[MemoryReport | None] = []

    async def short(units: Sequence[EncodeUnit]) -> list[Fetched]:
        seen.append((await house.jobs.get("a")).memory)
        if len(seen) == 1:
            raise OutOfMemory("the encoder clip-l: the device ran out of memory")
        return await house.pool.encode(units)

    monkeypatch.setattr(house, "encode", short)
    small, large = cards(house)
    house.placement, house.placements = small, (small, large)
    async with house.worker("small"):
        await house.submit("a")
        job = await house.ended("a")
    assert seen == [None, None]
    assert (job.state, job.attempt, job.memory) == (JobState.SUCCEEDED, 2, MemoryReport(rung=Rung.RESIDENT))


async def test_without_a_larger_card_it_is_tried_again_and_then_told(house: House) -> None:
    small, _ = cards(house)
    house.placement, house.placements = small, (small,)
    async with house.worker("small", Full(house.runner, 0)):
        await house.submit("a", guidance_scale=1.0)
        job = await house.ended("a")
    assert job.error is not None
    assert (job.state, job.attempt, job.error.code) == (JobState.FAILED, 3, "out_of_memory")
    assert "ran out of memory" in job.error.message
    assert job.memory == MemoryReport(retries=2, relief=(Relief("job", "another_time"),) * 2)


async def test_a_larger_card_that_lives_is_heard_of(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no settings know of it: it was found by its replica. While it lives, the mark holds."""
    monkeypatch.setattr("serve.worker.REPORT_S", 0.05)
    small, large = cards(house)
    house.placement = large
    async with house.worker("large") as other:
        house.placement = small
        async with house.worker("small") as worker:
            await until(lambda: worker._cards.marks.alive == large.max_pixels)
            assert other._cards.marks.alive == 0


async def test_a_mark_that_only_this_card_is_left_for_is_passed_over_by_it(house: House) -> None:
    """The placement with more memory is gone from the settings: the job waits no longer than any other."""
    small, large = cards(house)
    house.placement, house.placements = small, (small, large)
    async with house.worker("small", Full(a_runner(house.model), 0)):
        await house.submit("a")
        await house.reaches("a", lambda job: job.state is JobState.QUEUED and job.attempt == 1)
    now_s, _ = await house.jobs._redis.time()
    await house.jobs._redis.hset("tandem:job:a", "waiting", round(1000 * (now_s - AGED_S)))
    house.placements = (small,)
    async with house.worker("small"):
        job = await house.ended("a")
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
