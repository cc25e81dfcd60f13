"""Who is told of a job that is queued: few of many, those that suit it best, and always somebody who takes it."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from support.jobs import ANY, IMAGE, MODEL, Bench, a_request, on, until

from serve.domain.jobs import Timings
from serve.embedded import EmbeddedRedis
from serve.jobs.bell import WORK
from serve.jobs.records import Want
from serve.jobs.store import Claim, JobStore
from serve.jobs.terms import Hold
from serve.settings.stores import JobSettings
from serve.simulate.waiting import TOLD, Same, Waiting
from serve.telemetry.metrics import InProcessMetrics

CROWD, ORDERS = 48, 20
POLL_S = 600.0
"""So late a worker looks that was not told: later than the test ends."""


class Crowd:
    """Workers, each with connections of its own, whose jobs take no time.

    Owns: their tasks and stores.
    """

    def __init__(self, url: str) -> None:
        settings = JobSettings(redis_url=SecretStr(url), max_queued=1000)
        self.stores = {f"w{n}": JobStore(settings, InProcessMetrics()) for n in range(CROWD)}
        self.looks = self.waiting = 0
        self.taken: list[str] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._work(*each)) for each in self.stores.items()]
        await until(self._all_have_looked_twice, 30)  # once more as the subscription took effect
        await until(self.all_wait, 30)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for store in self.stores.values():
            await store.close()

    async def all_wait(self) -> bool:
        """Nobody looks, and nobody has been told to."""
        ringing = any(event.is_set() for store in self.stores.values() for event in store._bell._work.values())
        return self.waiting == CROWD and not ringing

    async def _all_have_looked_twice(self) -> bool:
        return self.looks >= 2 * CROWD

    async def _work(self, name: str, store: JobStore) -> None:
        while True:
            claim = await store.claim(name, ANY)
            self.looks += 1
            if isinstance(claim, Claim):
                self.taken.append(claim.job_id)
                await store.succeed(claim, images=[IMAGE], cache={}, timings=Timings())
                continue
            self.waiting += 1
            await store.wait_for_work(name, POLL_S)
            self.waiting -= 1


def test_an_order_is_told_to_few_of_many(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        async with Crowd(redis_url) as crowd:
            looks = []
            for number in range(ORDERS):
                before = crowd.looks
                await bench.store.submit(f"job{number}", a_request())
                await until(lambda number=number: _taken(crowd, number + 1), 30)
                await until(crowd.all_wait, 30)
                looks.append(crowd.looks - before)
        # Who got the job looks once more after it.
        assert sum(looks) <= ORDERS * (TOLD + 1), looks

    on(redis_url, story)


def test_what_comes_at_once_is_all_taken_though_nobody_looks_untold(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        async with Crowd(redis_url) as crowd:
            await asyncio.gather(*(bench.store.submit(f"job{n}", a_request()) for n in range(10 * ORDERS)))
            await until(lambda: _taken(crowd, 10 * ORDERS), 60)
        assert sorted(crowd.taken) == sorted(f"job{n}" for n in range(10 * ORDERS))

    on(redis_url, story, max_queued=1000)


async def _taken(crowd: Crowd, jobs: int) -> bool:
    return len(crowd.taken) == jobs


@dataclass(frozen=True)
class Standing:
    """A worker that stands by. `least` is what it leaves to smaller cards for a while; `waited_s` how long it leaves
    all to others, because it is full. Of `dead` ones nobody hears what they are told."""

    model: str
    least: int
    most: int
    idle: bool
    waited_s: float
    dead: bool

    @property
    def wants(self) -> list[Want]:
        aged, own = Want(self.model, 0, self.most, 30.0), Want(self.model, self.least, self.most, self.waited_s)
        return [own] if not self.least else [aged, own, Want(self.model, 0, self.least, self.waited_s)]


STANDING = st.builds(
    Standing,
    model=st.sampled_from([MODEL, "other"]),
    least=st.sampled_from([0, 64 * 64]),
    most=st.sampled_from([64 * 64, 96 * 96, 128 * 128]),
    idle=st.booleans(),
    waited_s=st.sampled_from([0.0, 0.25]),
    dead=st.booleans(),
)


class Rows:
    """All that the simulation asks of a replica here."""

    def __init__(self, rows: int) -> None:
        self.rows = rows


class Ears:
    """Hears what some of the workers are told.

    Owns: the subscription.
    """

    def __init__(self, bench: Bench, *workers: str) -> None:
        self._redis, self._pubsub = bench.store._redis, bench.store._redis.pubsub()
        self._channels = ["tandem:test", *(WORK + worker for worker in workers)]

    async def __aenter__(self) -> Self:
        await self._pubsub.subscribe(*self._channels)
        for _ in self._channels:
            await self._pubsub.get_message(timeout=10)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pubsub.aclose()

    async def heard(self) -> list[str]:
        """Who was told since this was last asked, in that order."""
        await self._redis.publish("tandem:test", "")
        names: list[str] = []
        async with asyncio.timeout(10):
            while (channel := (await self._pubsub.get_message(timeout=10))["channel"].decode()) != "tandem:test":
                names.append(channel.removeprefix(WORK))
        return names


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STANDING, max_size=8), st.lists(st.sampled_from([64, 96, 128, 256]), min_size=1, max_size=4))
def test_the_idle_are_told_first_and_of_each_kind_those_with_the_least_room(
    redis_url: str, crowd: Sequence[Standing], sides: Sequence[int]
) -> None:
    """And the simulation says the same."""

    async def story(bench: Bench) -> None:
        await bench.store._redis.flushall()
        left = {f"w{n}": each for n, each in enumerate(crowd)}
        for name, each in left.items():
            assert await bench.store.claim(name, each.wants, idle=each.idle) is None
        async with Ears(bench, *(name for name, each in left.items() if not each.dead)) as ears:
            for number, side in enumerate(sides):
                await bench.store.submit(f"job{number}", a_request(side=side))
                told = await ears.heard()
                simulated = Waiting(random.Random(number))
                for each in left.values():
                    if not each.dead:
                        simulated.join(Rows(not each.idle), each.wants)  # type: ignore[arg-type]
                expected = [group.rank for group, _ in simulated.told(MODEL, side * side)]
                assert [Same(left[name].wants, left[name].idle).rank for name in told] == expected
                for name in told:
                    del left[name]

    on(redis_url, story)


def test_equals_are_told_by_lot(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        names = [f"w{n}" for n in range(6)]
        told: Counter[str] = Counter()
        async with Ears(bench, *names) as ears:
            for number in range(60):
                for name in names:
                    assert await bench.store.claim(name, ANY) is None
                await bench.store.submit(f"job{number}", a_request())
                first, *_ = await ears.heard()
                told[first] += 1
                await bench.store.cancel(f"job{number}")
        # Who drew a late place keeps it until the others have drawn later ones.
        assert len(told) >= 4, told

    on(redis_url, story)


def test_who_is_left_with_nothing_to_claim_stands_by_and_nobody_else(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        store = bench.store
        small = Want(MODEL, 0, 64 * 64 - 1)
        async with Ears(bench, "first", "second", "third") as ears:
            for name in ("first", "second", "third"):
                assert await store.claim(name, ANY) is None
            for job_id in ("a", "b"):
                await store.submit(job_id, a_request())
            told = await ears.heard()
            assert sorted(told) == ["first", "second", "third"]
            first = await store.claim(told[2], ANY)
            assert isinstance(first, Claim)
            assert not first.last
            await store.submit("c", a_request())
            assert await ears.heard() == [], "it is to look again of itself, the others have been told"
            assert await store.claim(told[0], [small]) is Hold.UNFIT
            await store.submit("d", a_request())
            assert await ears.heard() == [], "too large"
            for job_id in ("b", "c", "d"):
                claim = await store.claim(told[2], ANY, idle=False)
                assert isinstance(claim, Claim)
                assert (claim.job_id, claim.last) == (job_id, job_id == "d")
            await store.submit("e", a_request())
            assert await ears.heard() == [told[2]], "it has taken the last"
            assert isinstance(await store.claim(told[1], ANY), Claim)
            await store.stand_by_no_more(told[1], MODEL)
            await store.release(first)
            assert await ears.heard() == []

    on(redis_url, story)


def test_a_claim_whose_answer_was_lost_stands_by_if_nothing_is_queued_any_more(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        store = bench.store
        for job_id in ("a", "b"):
            await store.submit(job_id, a_request())
        claim = await store.claim("one", ANY)
        assert isinstance(claim, Claim)
        assert isinstance(await store.claim("other", ANY), Claim)
        number = (await store._redis.hget(f"tandem:job:{claim.job_id}", "claim")).decode().removeprefix("one:")
        store._unanswered["one"] = number
        again = await store.claim("one", ANY)
        assert isinstance(again, Claim)
        assert (again.job_id, again.fence, again.last) == (claim.job_id, claim.fence, True)
        async with Ears(bench, "one") as ears:
            await store.submit("c", a_request())
            assert await ears.heard() == ["one"]

    on(redis_url, story)


def test_a_redis_that_takes_no_more_still_says_that_nothing_is_queued(jobs_redis: EmbeddedRedis) -> None:
    async def story(bench: Bench) -> None:
        assert await bench.store.claim("one", ANY) is None
        await bench.store._redis.config_set("maxmemory", 1)
        assert await bench.store.claim("other", ANY) is None
        await bench.store._redis.config_set("maxmemory", 0)

    on(jobs_redis.url, story)


def test_a_look_that_changes_nothing_writes_nothing(jobs_redis: EmbeddedRedis) -> None:
    """Each write waits for the disk, and everybody who is idle looks each second."""

    async def written(bench: Bench) -> int:
        return int((await bench.store._redis.info("persistence"))["aof_current_size"])

    async def story(bench: Bench) -> None:
        assert await bench.store.claim("one", ANY) is None
        before = await written(bench)
        for _ in range(20):
            assert await bench.store.claim("one", ANY) is None
        assert await written(bench) == before

    on(jobs_redis.url, story)
