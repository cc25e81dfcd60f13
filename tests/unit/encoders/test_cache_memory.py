"""The cache without Redis."""

import asyncio
import contextlib
import statistics
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.domain.text import CacheReport, EncodeUnit, Tier
from serve.encoders.cache import EmbeddingCache, Fetched
from serve.errors import BackendUnavailable
from serve.settings.stores import CacheSettings
from serve.telemetry.metrics import InProcessMetrics

ALPHABET = [EncodeUnit("encoder", (number,)) for number in range(6)]
CLIP, T5 = EncodeUnit("clip", (1,)), EncodeUnit("t5", (1,))
TEXTS = [
    EncodeUnit(encoder, (n,), output) for encoder in ("clip", "t5") for n in (1, 2) for output in ("hidden", "pooled")
]


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
        self.cancelled = 0

    async def fetch(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
        self.calls.append(tuple(units))
        self.called.release()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error:
            raise self.error
        return [Fetched(value_of(unit), Tier.ENCODED) for unit in units]


def make(below: Below, memory_bytes: int = 1 << 20, *, by_row: bool = False) -> tuple[EmbeddingCache, InProcessMetrics]:
    metrics, settings = InProcessMetrics(), CacheSettings(memory_bytes=memory_bytes)
    return EmbeddingCache(settings, below.fetch, metrics, place="encoder", by_row=by_row), metrics


async def settle() -> None:
    """Let every task do all that it can do now."""
    for _ in range(10):
        await asyncio.sleep(0)


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
        stats = cache.stats()
        assert (stats.entries, stats.in_flight, stats.redis) == (2, 0, "off")
        assert stats.hits == CacheReport(memory=1, encoded=2)
        assert metrics.value("tandem_cache_entries", place="encoder") == 2
        assert metrics.value("tandem_cache_bytes", place="encoder") == stats.bytes > 800
        assert await cache.get_many([]) == {}
        cache.clear()
        assert (cache.stats().entries, cache.stats().bytes, cache.stats().capacity) == (0, 0, 1 << 20)
        assert metrics.value("tandem_cache_bytes", place="encoder") == 0
        assert (await cache.get_many([first]))[first.key].tier is Tier.ENCODED
        cache.check_integrity()

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


def test_a_fetch_ends_when_the_last_caller_leaves() -> None:
    async def main() -> None:
        below = Below()
        below.gate.clear()
        cache, _ = make(below)
        callers = [asyncio.create_task(cache.get_many(ALPHABET[at : at + 2])) for at in (0, 0, 1)]
        await below.called.acquire()
        await below.called.acquire()
        for caller in callers[:2]:
            caller.cancel()
        await settle()
        assert below.cancelled == 0  # the third shares one unit of the first fetch
        callers[2].cancel()
        await settle()
        assert below.cancelled == 2
        assert cache.stats().in_flight == 0
        below.gate.set()
        assert len(await cache.get_many(ALPHABET[:3])) == 3
        assert below.calls[2:] == [tuple(ALPHABET[:3])]

    asyncio.run(main())


def test_who_comes_while_an_abandoned_fetch_winds_up_gets_a_new_one() -> None:
    async def main() -> None:
        below = Below()
        below.gate.clear()
        cache, _ = make(below)
        first = asyncio.create_task(cache.get_many(ALPHABET[:1]))
        await below.called.acquire()
        first.cancel()
        await asyncio.sleep(0)
        second = asyncio.create_task(cache.get_many(ALPHABET[:1]))
        await below.called.acquire()
        await settle()
        third = asyncio.create_task(cache.get_many(ALPHABET[:1]))
        await settle()
        below.gate.set()
        assert (await second) == (await third)
        assert (await second)[ALPHABET[0].key].value == value_of(ALPHABET[0])
        assert (len(below.calls), below.cancelled, cache.stats().in_flight) == (2, 1, 0)

    asyncio.run(main())


def test_one_failed_unit_does_not_wait_for_a_slow_one() -> None:
    async def main() -> None:
        slow = asyncio.Event()

        async def fetch(units: Sequence[EncodeUnit]) -> list[Fetched]:
            if units[0] == ALPHABET[0]:
                await slow.wait()
            raise BackendUnavailable("away")

        cache = EmbeddingCache(CacheSettings(), fetch, InProcessMetrics(), place="encoder")
        waiting = asyncio.create_task(cache.get_many(ALPHABET[:1]))
        await settle()
        with pytest.raises(BackendUnavailable):
            await cache.get_many(ALPHABET[:2])
        slow.set()
        with pytest.raises(BackendUnavailable):
            await waiting

    asyncio.run(main())


class TwoEncoders(Below):
    """A T5 that `gate` holds up and `error` fails, and a CLIP that always answers at once."""

    async def fetch(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
        if units[0].encoder == T5.encoder:
            return await super().fetch(units)
        self.calls.append(tuple(units))
        return [Fetched(value_of(unit), Tier.ENCODED) for unit in units]


def test_a_stranger_waits_for_no_encoder_but_its_own() -> None:
    """One asks for CLIP and for a T5 that has to wake up; who joins it for CLIP alone has its answer at once."""

    async def main() -> None:
        below = TwoEncoders()
        below.gate.clear()
        cache, _ = make(below)
        both = asyncio.create_task(cache.get_many([CLIP, T5]))
        clip = asyncio.create_task(cache.get_many([CLIP]))
        await below.called.acquire()
        await settle()
        assert clip.done()
        assert clip.result()[CLIP.key].value == value_of(CLIP)
        assert (await cache.get_many([CLIP]))[CLIP.key].tier is Tier.MEMORY
        assert not both.done()
        assert below.calls == [(CLIP,), (T5,)]
        below.gate.set()
        assert len(await both) == 2

    asyncio.run(main())


def test_a_stranger_fails_with_no_encoder_but_its_own() -> None:
    async def main() -> None:
        below = TwoEncoders()
        below.error = BackendUnavailable("no replica")
        cache, _ = make(below)
        both = asyncio.create_task(cache.get_many([CLIP, T5]))
        clip = asyncio.create_task(cache.get_many([CLIP]))
        with pytest.raises(BackendUnavailable):
            await both
        assert (await clip)[CLIP.key].tier is Tier.ENCODED
        assert cache.stats().in_flight == 0

    asyncio.run(main())


def test_by_row_a_text_that_nobody_wants_any_more_is_given_up_alone() -> None:
    async def main() -> None:
        below = Below()
        below.gate.clear()
        cache, _ = make(below, by_row=True)
        one, other = TEXTS[:2], TEXTS[2:4]
        leaving = asyncio.create_task(cache.get_many(one + other))
        staying = asyncio.create_task(cache.get_many(one))
        await below.called.acquire()
        await below.called.acquire()
        assert below.calls == [tuple(one), tuple(other)]  # one forward gives both outputs of a text
        leaving.cancel()
        await settle()
        assert (below.cancelled, cache.stats().in_flight) == (1, 2)
        below.gate.set()
        assert set(await staying) == {unit.key for unit in one}
        assert cache.stats().entries == 2
        cache.check_integrity()

    asyncio.run(main())


def test_a_by_product_is_a_hit() -> None:
    async def main() -> None:
        below = Below()
        cache, _ = make(below)
        cache.adopt({unit: value_of(unit) for unit in ALPHABET[:2]})
        assert cache.stats().entries == 2
        got = await cache.get_many(ALPHABET[:3])
        assert [each.tier for each in got.values()] == [Tier.MEMORY, Tier.MEMORY, Tier.ENCODED]
        assert below.calls == [(ALPHABET[2],)]
        cache.adopt({ALPHABET[0]: b"another forward's"})
        assert (await cache.get_many(ALPHABET[:1]))[ALPHABET[0].key].value == value_of(ALPHABET[0])

    asyncio.run(main())


def test_a_by_product_that_comes_during_the_fetch_is_what_all_get() -> None:
    async def main() -> None:
        below = Below()
        below.gate.clear()
        cache, _ = make(below)
        waiting = asyncio.create_task(cache.get_many(ALPHABET[:1]))
        await below.called.acquire()
        cache.adopt({ALPHABET[0]: b"earlier"})
        below.gate.set()
        assert (await waiting)[ALPHABET[0].key].value == b"earlier"
        assert (await cache.get_many(ALPHABET[:1]))[ALPHABET[0].key] == Fetched(b"earlier", Tier.MEMORY)

    asyncio.run(main())


def test_a_hit_in_memory_takes_microseconds() -> None:
    """The bar is 0.05 ms; the test leaves room for a busy machine."""

    async def main() -> None:
        below = Below()
        cache, _ = make(below)
        pair = [EncodeUnit("f" * 32, tuple(range(77)), output) for output in ("skip:1", "projected:01234567")]
        await cache.get_many(pair)
        times = []
        for _ in range(200):
            started = time.perf_counter()
            await cache.get_many(pair)
            times.append(time.perf_counter() - started)
        assert statistics.median(times) < 0.25e-3

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

        cache = EmbeddingCache(CacheSettings(), fetch, InProcessMetrics(), place="encoder")
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


def test_close_waits_for_what_nobody_wants_any_more() -> None:
    async def main() -> None:
        asked, ended = asyncio.Event(), asyncio.Event()

        async def fetch(units: Sequence[EncodeUnit]) -> list[Fetched]:
            asked.set()
            try:
                await asyncio.Event().wait()
            finally:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()  # it takes its leave slowly
                await asyncio.sleep(0)
                ended.set()
            raise AssertionError

        cache = EmbeddingCache(CacheSettings(), fetch, InProcessMetrics(), place="encoder")
        leaving = asyncio.create_task(cache.get_many(ALPHABET[:1]))
        await asked.wait()
        leaving.cancel()
        await settle()
        assert cache.stats().in_flight == 0
        await cache.close()
        assert ended.is_set()

    asyncio.run(main())


@given(
    st.sampled_from([0, 700, 1500, 100_000]),
    st.lists(st.tuples(st.lists(st.sampled_from(ALPHABET), max_size=5), st.booleans()), max_size=20),
)
def test_any_calls_answer_as_a_dict_would(memory_bytes: int, calls: list[tuple[list[EncodeUnit], bool]]) -> None:
    """Whatever is asked in whatever order, with failures in between and any capacity, the answer is the right value."""

    async def main() -> None:
        below = Below()
        cache, _ = make(below, memory_bytes)
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
        hits = cache.stats().hits
        assert hits.memory + hits.encoded == asked
        if memory_bytes == 100_000:
            served = [unit for call in below.calls for unit in call]
            failures = sum(fails for _, fails in calls)
            assert failures or len(served) == len(set(served))

    asyncio.run(main())


@given(
    st.lists(
        st.one_of(
            st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4),  # a caller arrives
            st.tuples(st.just("cancel"), st.integers(0, 9)),
            st.tuples(st.just("answer"), st.booleans()),  # the oldest fetch ends, well or not
            st.tuples(st.just("adopt"), st.sampled_from(TEXTS)),
            st.just("pass"),
        ),
        max_size=30,
    ),
    st.booleans(),
)
def test_no_interleaving_fetches_a_unit_twice_at_once(events: list[object], by_row: bool) -> None:
    async def main() -> None:
        under_way: dict[asyncio.Future[None], set[EncodeUnit]] = {}

        async def fetch(units: Sequence[EncodeUnit]) -> list[Fetched]:
            assert not set().union(*under_way.values()) & set(units)
            assert len({(unit.encoder, unit.token_ids if by_row else ()) for unit in units}) == 1
            answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            under_way[answer] = set(units)
            try:
                await answer
            finally:
                del under_way[answer]
            return [Fetched(value_of(unit), Tier.ENCODED) for unit in units]

        small = CacheSettings(memory_bytes=1000)
        cache = EmbeddingCache(small, fetch, InProcessMetrics(), place="encoder", by_row=by_row)
        callers: list[tuple[list[EncodeUnit], asyncio.Task[dict[str, Fetched]]]] = []

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
            elif event[0] == "adopt":
                cache.adopt({event[1]: value_of(event[1])})
            elif event[1] < len(callers):
                callers[event[1]][1].cancel()
            cache.check_integrity()
        await settle()
        waited_for = set().union(*(wanted for wanted, caller in callers if not caller.done()))
        assert all(units & waited_for for units in under_way.values())  # none goes on for nobody
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
