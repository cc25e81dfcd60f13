"""The cache without Redis."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.domain import EncodeUnit, Tier
from serve.encoders.cache import EmbeddingCache, Fetched
from serve.errors import BackendUnavailable
from serve.settings import CacheSettings
from serve.telemetry.metrics import InProcessMetrics

ALPHABET = [EncodeUnit("encoder", (number,)) for number in range(6)]


def value_of(unit: EncodeUnit) -> bytes:
    return unit.key.encode() * 10


class Below:
    """The tier below: counts, can be held up, can fail."""

    def __init__(self) -> None:
        self.calls: list[tuple[EncodeUnit, ...]] = []
        self.called = asyncio.Semaphore(0)
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def fetch(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
        self.calls.append(tuple(units))
        self.called.release()
        await self.gate.wait()
        if self.error:
            raise self.error
        return [Fetched(value_of(unit), Tier.ENCODED) for unit in units]


def make(below: Below, memory_bytes: int = 1 << 20) -> tuple[EmbeddingCache, InProcessMetrics]:
    metrics = InProcessMetrics()
    return EmbeddingCache(CacheSettings(memory_bytes=memory_bytes), below.fetch, metrics), metrics


def test_a_miss_then_a_hit_then_mixed() -> None:
    async def main() -> None:
        below = Below()
        cache, metrics = make(below)
        first, second = ALPHABET[:2]
        assert await cache.get_many([first]) == {first.key: Fetched(value_of(first), Tier.ENCODED)}
        got = await cache.get_many([second, first, second])
        assert got == {
            second.key: Fetched(value_of(second), Tier.ENCODED),
            first.key: Fetched(value_of(first), Tier.MEMORY),
        }
        assert list(got) == [second.key, first.key]
        assert below.calls == [(first,), (second,)]
        assert metrics.value("tandem_cache_units_total", tier="memory") == 1
        assert metrics.value("tandem_cache_units_total", tier="encoded") == 2
        assert cache.stats().entries == 2
        assert cache.stats().in_flight == 0
        assert await cache.get_many([]) == {}

    asyncio.run(main())


def test_a_hundred_simultaneous_misses_are_one_fetch() -> None:
    async def main() -> None:
        below = Below()
        below.gate.clear()
        cache, _ = make(below)
        callers = [asyncio.create_task(cache.get_many(ALPHABET[:2])) for _ in range(100)]
        await below.called.acquire()
        below.gate.set()
        results = await asyncio.gather(*callers)
        assert below.calls == [tuple(ALPHABET[:2])]
        assert all(result == results[0] for result in results)

    asyncio.run(main())


def test_overlapping_requests_fetch_each_unit_once() -> None:
    async def main() -> None:
        below = Below()
        below.gate.clear()
        cache, _ = make(below)
        callers = [asyncio.create_task(cache.get_many(ALPHABET[at : at + 3])) for at in range(3)]
        for _ in range(3):
            await below.called.acquire()
        below.gate.set()
        results = await asyncio.gather(*callers)
        assert sorted(unit.token_ids for call in below.calls for unit in call) == [(n,) for n in range(5)]
        assert [len(result) for result in results] == [3, 3, 3]

    asyncio.run(main())


def test_a_cancelled_leader_leaves_the_followers_their_answer() -> None:
    async def main() -> None:
        below = Below()
        below.gate.clear()
        cache, _ = make(below)
        leader = asyncio.create_task(cache.get_many(ALPHABET[:1]))
        await below.called.acquire()
        follower = asyncio.create_task(cache.get_many(ALPHABET[:1]))
        await asyncio.sleep(0)
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
        below.gate.set()
        assert (await follower)[ALPHABET[0].key].value == value_of(ALPHABET[0])
        assert len(below.calls) == 1

    asyncio.run(main())


def test_a_failure_reaches_who_waited_and_is_not_kept() -> None:
    async def main() -> None:
        below = Below()
        below.error = BackendUnavailable("away")
        below.gate.clear()
        cache, _ = make(below)
        callers = [asyncio.create_task(cache.get_many(ALPHABET[:1])) for _ in range(3)]
        await below.called.acquire()
        below.gate.set()
        results = await asyncio.gather(*callers, return_exceptions=True)
        assert [type(result) for result in results] == [BackendUnavailable] * 3
        below.error = None
        assert (await cache.get_many(ALPHABET[:1]))[ALPHABET[0].key].tier is Tier.ENCODED
        assert cache.stats().in_flight == 0

    asyncio.run(main())


def test_a_tier_below_that_answers_too_little_is_an_error() -> None:
    async def main() -> None:
        async def fetch(units: Sequence[EncodeUnit]) -> list[Fetched]:
            return []

        cache = EmbeddingCache(CacheSettings(), fetch, InProcessMetrics())
        with pytest.raises(ValueError, match="shorter"):
            await cache.get_many(ALPHABET[:1])

    asyncio.run(main())


def test_close_ends_what_is_under_way() -> None:
    async def main() -> None:
        below = Below()
        below.gate.clear()
        cache, _ = make(below)
        waiting = asyncio.create_task(cache.get_many(ALPHABET[:1]))
        await below.called.acquire()
        await cache.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())


@given(
    st.sampled_from([0, 700, 1500, 100_000]),
    st.lists(st.tuples(st.lists(st.sampled_from(ALPHABET), max_size=5), st.booleans()), max_size=20),
)
def test_any_calls_answer_as_a_dict_would(memory_bytes: int, calls: list[tuple[list[EncodeUnit], bool]]) -> None:
    """Whatever is asked in whatever order, with failures in between and any capacity, the answer is the right value."""

    async def main() -> None:
        below = Below()
        cache, metrics = make(below, memory_bytes)
        asked = 0
        for units, fails in calls:
            below.error = BackendUnavailable("away") if fails else None
            before = len(below.calls)
            try:
                got = await cache.get_many(units)
            except BackendUnavailable:
                assert fails
                continue
            asked += len(set(units))
            assert {key: each.value for key, each in got.items()} == {unit.key: value_of(unit) for unit in units}
            fetched = {unit for call in below.calls[before:] for unit in call}
            assert {unit for unit in units if got[unit.key].tier is Tier.ENCODED} == fetched
            cache.check_integrity()
        assert cache.stats().bytes <= memory_bytes
        assert metrics.value("tandem_cache_units_total") == asked
        if memory_bytes == 100_000:
            served = [unit for call in below.calls for unit in call]
            failures = sum(fails for _, fails in calls)
            assert failures or len(served) == len(set(served))

    asyncio.run(main())


@given(
    st.lists(
        st.one_of(
            st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=4),  # a caller arrives
            st.tuples(st.just("cancel"), st.integers(0, 9)),
            st.tuples(st.just("answer"), st.booleans()),  # the oldest fetch ends, well or not
            st.just("pass"),
        ),
        max_size=30,
    )
)
def test_no_interleaving_fetches_a_unit_twice_at_once(events: list[object]) -> None:
    async def main() -> None:
        under_way: dict[asyncio.Future[None], set[EncodeUnit]] = {}

        async def fetch(units: Sequence[EncodeUnit]) -> list[Fetched]:
            assert not set().union(*under_way.values()) & set(units)
            answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            under_way[answer] = set(units)
            try:
                await answer
            finally:
                del under_way[answer]
            return [Fetched(value_of(unit), Tier.ENCODED) for unit in units]

        cache = EmbeddingCache(CacheSettings(memory_bytes=1000), fetch, InProcessMetrics())
        callers: list[tuple[list[EncodeUnit], asyncio.Task[dict[str, Fetched]]]] = []

        async def settle() -> None:
            for _ in range(5):
                await asyncio.sleep(0)

        def end_oldest(well: bool) -> None:
            answer = next((each for each in under_way if not each.done()), None)
            if answer is not None and well:
                answer.set_result(None)
            elif answer is not None:
                answer.set_exception(BackendUnavailable("away"))

        for event in events:
            if isinstance(event, list):
                callers.append((event, asyncio.create_task(cache.get_many(event))))
            elif event == "pass":
                await settle()
            elif event[0] == "answer":
                end_oldest(event[1])
            elif event[1] < len(callers):
                callers[event[1]][1].cancel()
        await settle()
        while under_way:
            end_oldest(True)
            await settle()
        for wanted, caller in callers:
            (result,) = await asyncio.gather(caller, return_exceptions=True)
            if isinstance(result, dict):
                assert {key: got.value for key, got in result.items()} == {unit.key: value_of(unit) for unit in wanted}
            else:
                assert isinstance(result, BackendUnavailable | asyncio.CancelledError)
        cache.check_integrity()
        assert cache.stats().in_flight == 0

    asyncio.run(main())
