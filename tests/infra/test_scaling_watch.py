"""What the job store says of the work for scaling, and what a store that is away does to it."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import redis
from support.jobs import ANY, BROKEN, MODEL, Bench, a_request, on
from support.server import wait_until

from serve.domain.jobs import MemoryReport
from serve.embedded import EmbeddedRedis
from serve.jobs.terms import Terms, WorkerReport
from serve.scaling.demand import Band, Place
from serve.scaling.watch import FORGOTTEN_S, STALE_S, Look, StoreAt, Watch

BOUNDS = {MODEL: [64 * 64, 128 * 128], "other": [64 * 64]}
PLACES = (
    Place("small", MODEL, 64 * 64, 0, 4, target_wait_s=10),
    Place("large", MODEL, 128 * 128, 0, 4, target_wait_s=10),
)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def worker(name: str, placement: str, pace: float) -> WorkerReport:
    return WorkerReport(
        name=name, model=MODEL, placement=placement, max_pixels=64 * 64, max_rows=8, batch=4, vae_factor=8, pace=pace
    )


def work(bands: Sequence[Band]) -> dict[tuple[int, int], tuple[float, float, int]]:
    """By size and memory; what is empty left out."""
    return {(band.upto, band.above_mb): (band.queued_ms, band.held_ms, band.jobs) for band in bands if band.jobs}


def test_work_is_told_by_size_from_the_order_to_the_end(redis_url: str) -> None:
    small, large = 64 * 64, 128 * 128

    async def story(bench: Bench) -> None:
        look = Look(redis_url, BOUNDS)
        assert work(look(0.0)[0][MODEL]) == {}
        for name, side, cost in (("a", 64, 4000), ("b", 64, 1000), ("c", 96, 500), ("d", 256, 900)):
            await bench.store.submit(name, a_request(side=side), terms=Terms(cost_ms=cost))
        await bench.store.submit("e", a_request(model="other"), terms=Terms(cost_ms=70))
        found, _ = look(1.0)
        assert work(found[MODEL]) == {(small, 0): (5000, 0, 2), (large, 0): (500, 0, 1)}, "nobody holds the largest"
        assert work(found["other"]) == {(small, 0): (70, 0, 1)}
        assert [(band.above, band.upto) for band in found[MODEL]] == [(0, small), (small, large)]
        claim = await bench.store.claim("worker", ANY)
        assert claim is not None
        await bench.store.renew(claim, 3)  # of four steps
        assert work(look(2.0)[0][MODEL])[small, 0] == (1000, 1000, 2)
        await bench.store.fail(claim, BROKEN, retry=True, memory=MemoryReport(above_mb=4000))
        assert work(look(3.0)[0][MODEL])[small, 4000] == (4000, 0, 1), "what is for more memory is told apart"
        for name in "abcde":
            await bench.store.cancel(name)
        assert [work(bands) for bands in look(4.0)[0].values()] == [{}, {}]

    on(redis_url, story)


def test_what_arrived_counts_once_also_where_it_is_done_by_then(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        look = Look(redis_url, BOUNDS)
        await bench.store.submit("before", a_request(), terms=Terms(cost_ms=6000))
        assert look(0.0)[0][MODEL][0].rate == 0, "nobody knows when it came"
        await bench.succeed(await bench.claimed("quick"))
        await bench.store.submit("slow", a_request(side=96), terms=Terms(cost_ms=6000))
        first = look(0.0)[0][MODEL]
        assert [band.rate for band in first] == [pytest.approx(1 / 60_000), pytest.approx(6000 / 60_000)]
        later = look(60.0)[0][MODEL]
        assert later[1].rate == pytest.approx(0.1 / 2.71828, rel=1e-4)
        redis.Redis.from_url(redis_url).flushall()
        assert look(60.0)[0][MODEL][1].rate == later[1].rate
        await bench.store.submit("new", a_request(side=96), terms=Terms(cost_ms=6000))
        assert look(60.0)[0][MODEL][1].rate == pytest.approx(later[1].rate + 0.1), "its numbers begin anew"

    on(redis_url, story)


def test_a_pace_is_the_mean_of_those_who_tell_theirs(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for name, placement, pace in (("a", "small", 1.0), ("b", "small", 2.0), ("c", "large", 0.5)):
            await bench.store.report(worker(name, placement, pace))
        assert Look(redis_url, BOUNDS)(0.0)[1] == {"small": 1.5, "large": 0.5}

    on(redis_url, story)


def watching() -> int:
    return sum(each.name == "watch-job-store" for each in threading.enumerate())


def test_a_store_that_is_away_is_nothing_known_and_is_back_by_itself(jobs_redis: EmbeddedRedis) -> None:
    clock = Clock()
    watch = Watch(StoreAt(url=jobs_redis.url), PLACES, clock)
    assert watch.seen() is None, "whoever asks does not wait"

    def seen() -> bool:
        return watch.seen() is not None

    wait_until(seen, 10, "a first look")
    known = watch.seen()
    assert known is not None
    assert known.wanted == {"small": 0, "large": 0}
    jobs_redis.kill()
    wait_until(lambda: watch.doubt, 10, "a look that fails")
    clock.now += STALE_S + 1
    assert watch.seen() is None
    jobs_redis.start()
    wait_until(seen, 10, "the store")
    assert watch.doubt == ""
    before = watching()
    clock.now += FORGOTTEN_S + 1
    wait_until(lambda: watching() < before, 10, "a watch that nobody asks to end")
    wait_until(seen, 10, "the next question to begin it again")
    clock.now += FORGOTTEN_S + 1


def test_a_url_that_the_environment_lacks_is_nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_JOBS__REDIS_URL", raising=False)
    clock = Clock()
    watch = Watch(StoreAt(variable="TANDEM_JOBS__REDIS_URL"), PLACES, clock)
    assert watch.seen() is None
    wait_until(lambda: watch.doubt, 10, "a look")
    assert "TANDEM_JOBS__REDIS_URL" in watch.doubt
    assert watch.seen() is None
    clock.now += FORGOTTEN_S + 1
