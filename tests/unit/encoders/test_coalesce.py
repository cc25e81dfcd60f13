import asyncio
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.encoders.coalesce import Coalescer

BAD = -1


class Machine:
    """What batches are run by: records them, and runs only when it is let. An item is a number; BAD ones fail."""

    def __init__(self, free: bool = True) -> None:
        self.batches: list[list[int]] = []
        self.started = threading.Semaphore(0)
        self.let = threading.Semaphore(1000 if free else 0)

    def run(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.started.release()
        assert self.let.acquire(timeout=10)
        if BAD in items:
            raise ArithmeticError("bad")
        return [item * 10 for item in items]


@dataclass
class Heard:
    """What the callbacks were told."""

    dropped: list[int] = field(default_factory=list)
    unclaimed: list[tuple[int, int]] = field(default_factory=list)
    load: int = -1

    def hear_load(self, tokens: int) -> None:
        self.load = tokens


def length_of(item: int) -> int:
    """Items of three lengths: 2, 3 and 9 tokens."""
    return (2, 3, 9)[item % 3]


def make(
    machine: Machine, max_batch_size: int = 8, max_batch_tokens: int = 10**6, length=lambda item: 1
) -> tuple[Coalescer[int, int], Heard]:
    heard = Heard()
    coalescer = Coalescer(
        machine.run,
        length=length,
        max_batch_size=max_batch_size,
        max_batch_tokens=max_batch_tokens,
        on_dropped=heard.dropped.append,
        on_unclaimed=lambda item, result: heard.unclaimed.append((item, result)),
        on_load=heard.hear_load,
    )
    return coalescer, heard


async def until_started(machine: Machine) -> None:
    assert await asyncio.to_thread(machine.started.acquire, timeout=10)


async def settle() -> None:
    """Let everything that is ready run."""
    for _ in range(6):
        await asyncio.sleep(0)


async def submit(coalescer: Coalescer[int, int], item: int) -> int:
    (result,) = await coalescer.submit_all([item])
    return result


async def until_empty(coalescer: Coalescer[int, int]) -> None:
    while coalescer.queued_tokens:  # noqa: ASYNC110  the batch ends in a thread
        await asyncio.sleep(0)


def test_what_is_submitted_together_runs_together() -> None:
    async def main() -> None:
        machine = Machine()
        coalescer, _ = make(machine)
        assert await coalescer.submit_all([1, 2, 3]) == [10, 20, 30]
        assert await asyncio.gather(*(submit(coalescer, item) for item in range(4))) == [0, 10, 20, 30]
        assert machine.batches == [[1, 2, 3], [0, 1, 2, 3]]
        assert await coalescer.submit_all([]) == []
        await coalescer.close()

    asyncio.run(main())


def test_an_idle_one_waits_for_nobody() -> None:
    """The batch starts although its only caller is all there ever will be; nothing lets time pass."""

    async def main() -> None:
        machine = Machine()
        coalescer, _ = make(machine)
        for item in range(3):
            assert await submit(coalescer, item) == item * 10
        assert machine.batches == [[0], [1], [2]]
        await coalescer.close()

    asyncio.run(main())


def test_a_batch_grows_while_another_runs_up_to_the_limit() -> None:
    async def main() -> None:
        machine = Machine(free=False)
        coalescer, _ = make(machine, 4)
        first = asyncio.create_task(submit(coalescer, 0))
        await until_started(machine)
        rest = [asyncio.create_task(submit(coalescer, item)) for item in range(1, 7)]
        await settle()
        assert coalescer.queued_tokens == 7
        machine.let.release(10)
        assert await asyncio.gather(first, *rest) == [0, 10, 20, 30, 40, 50, 60]
        assert machine.batches == [[0], [1, 2, 3, 4], [5, 6]]
        assert coalescer.queued_tokens == 0
        await coalescer.close()

    asyncio.run(main())


def test_batches_have_one_length_few_enough_tokens_and_the_oldest_item() -> None:
    async def main() -> None:
        machine = Machine(free=False)
        coalescer, _ = make(machine, 4, max_batch_tokens=8, length=length_of)
        first = asyncio.create_task(submit(coalescer, 0))
        await until_started(machine)
        rest = [asyncio.create_task(submit(coalescer, item)) for item in (2, 1, 3, 4, 6, 7, 9, 12, 15, 5)]
        await settle()
        machine.let.release(20)
        await asyncio.gather(first, *rest)
        # 2 and 5 are longer than a batch may be: each goes alone. Two of 3 tokens fit, four of 2 tokens.
        assert machine.batches == [[0], [2], [1, 4], [3, 6, 9, 12], [7], [15], [5]]
        await coalescer.close()

    asyncio.run(main())


def test_the_same_item_runs_once_for_all_who_ask_while_it_waits_or_runs() -> None:
    async def main() -> None:
        machine = Machine(free=False)
        coalescer, _ = make(machine)
        running = asyncio.create_task(coalescer.submit_all([1, 1]))
        await until_started(machine)
        joins = [asyncio.create_task(coalescer.submit_all([1, 2])) for _ in range(50)]
        await settle()
        machine.let.release(10)
        assert await running == [10, 10]
        assert await asyncio.gather(*joins) == [[10, 20]] * 50
        assert machine.batches == [[1], [2]]
        assert await submit(coalescer, 1) == 10
        assert machine.batches == [[1], [2], [1]], "it is a queue and no cache"
        await coalescer.close()

    asyncio.run(main())


def test_cancelled_callers_are_dropped_before_the_batch_and_counted() -> None:
    async def main() -> None:
        machine = Machine(free=False)
        coalescer, heard = make(machine, 4)
        first = asyncio.create_task(submit(coalescer, 0))
        await until_started(machine)
        leavers = [asyncio.create_task(submit(coalescer, item)) for item in (1, 2, 2)]
        stayer = asyncio.create_task(submit(coalescer, 2))
        await settle()
        for leaver in leavers:
            leaver.cancel()
        await settle()
        assert coalescer.queued_tokens == 2
        assert heard.dropped == [1], "item 2 has a caller left"
        machine.let.release(10)
        assert await asyncio.gather(first, stayer) == [0, 20]
        assert machine.batches == [[0], [2]]
        await coalescer.close()

    asyncio.run(main())


def test_a_caller_cancelled_during_its_batch_harms_nobody() -> None:
    async def main() -> None:
        machine = Machine(free=False)
        coalescer, heard = make(machine, 4)
        leaver, stayer = (asyncio.create_task(submit(coalescer, item)) for item in (1, 2))
        await until_started(machine)
        leaver.cancel()
        await settle()
        machine.let.release(10)
        assert await stayer == 20
        assert heard.unclaimed == [(1, 10)], "what was computed for nobody is not lost"
        assert await submit(coalescer, 3) == 30
        await coalescer.close()

    asyncio.run(main())


def test_an_exception_belongs_to_the_item_that_raised_it() -> None:
    async def main() -> None:
        machine = Machine(free=False)
        coalescer, _ = make(machine)
        first = asyncio.create_task(submit(coalescer, 0))
        await until_started(machine)
        callers = [asyncio.create_task(submit(coalescer, item)) for item in (1, 2, BAD, 3, 4)]
        both = asyncio.create_task(coalescer.submit_all([1, BAD]))
        await settle()
        machine.let.release(100)
        results = await asyncio.gather(first, *callers, return_exceptions=True)
        assert [type(result) for result in results] == [int, int, int, ArithmeticError, int, int]
        with pytest.raises(ArithmeticError):
            await both
        assert await submit(coalescer, 6) == 60
        coalescer.check_integrity()
        await coalescer.close()

    asyncio.run(main())


def test_who_left_while_a_batch_failed_is_not_tried_again() -> None:
    async def main() -> None:
        machine = Machine(free=False)
        coalescer, heard = make(machine)
        bad, leaver = (asyncio.create_task(submit(coalescer, item)) for item in (BAD, 1))
        await until_started(machine)
        leaver.cancel()
        await settle()
        machine.let.release(10)
        with pytest.raises(ArithmeticError):
            await bad
        await until_empty(coalescer)
        assert machine.batches == [[BAD, 1], [BAD]]
        assert heard.dropped == [1]
        await coalescer.close()

    asyncio.run(main())


@pytest.mark.parametrize("bad", [BAD, 1])
def test_the_load_is_told_when_the_last_caller_left_its_batch(bad: int) -> None:
    async def main() -> None:
        machine = Machine(free=False)
        coalescer, heard = make(machine)
        leaver = asyncio.create_task(submit(coalescer, bad))
        await until_started(machine)
        assert heard.load == 1
        leaver.cancel()
        await settle()
        machine.let.release(10)
        await until_empty(coalescer)
        await settle()
        assert heard.load == 0
        await coalescer.close()

    asyncio.run(main())


def test_a_fatal_error_belongs_to_the_whole_batch() -> None:
    async def main() -> None:
        machine = Machine(free=False)
        coalescer = Coalescer(
            machine.run, length=lambda item: 1, max_batch_size=8, max_batch_tokens=8, fatal=(ArithmeticError,)
        )
        callers = [asyncio.create_task(submit(coalescer, item)) for item in (1, BAD, 2)]
        await until_started(machine)
        machine.let.release(10)
        results = await asyncio.gather(*callers, return_exceptions=True)
        assert [type(result) for result in results] == [ArithmeticError] * 3
        assert machine.batches == [[1, BAD, 2]]
        assert await submit(coalescer, 3) == 30
        coalescer.check_integrity()
        await coalescer.close()

    asyncio.run(main())


class Activations(list[int]):
    """Something large that a weak reference can watch."""


def test_the_halves_of_a_batch_run_without_what_it_held() -> None:
    """The error of a batch that did not fit, and the one that caused it, point to the frames that held its tensors."""
    held: list[weakref.ref[Activations]] = []
    alive = []

    def forward(items: list[int]) -> list[int]:
        activations = Activations(items)
        held.append(weakref.ref(activations))
        raise MemoryError(len(activations))

    def run(items: list[int]) -> list[int]:
        alive.append(sum(reference() is not None for reference in held))
        if len(items) == 1:
            return items
        try:
            return forward(items)
        except MemoryError as error:
            raise ArithmeticError("too much") from error

    async def main() -> None:
        coalescer = Coalescer(run, length=lambda item: 1, max_batch_size=8, max_batch_tokens=8)
        assert await coalescer.submit_all([1, 2, 3, 4]) == [1, 2, 3, 4]
        assert alive == [0] * 7
        await coalescer.close()

    asyncio.run(main())


@pytest.mark.parametrize("error", [StopIteration(), asyncio.CancelledError(), SystemExit(1)], ids=repr)
def test_no_exception_wedges_it(error: BaseException) -> None:
    """asyncio can't carry a StopIteration, and would take the others for its own."""
    batches = []

    def run(items: list[int]) -> list[int]:
        batches.append(items)
        if len(batches) == 1:
            raise error
        return items

    async def main() -> None:
        coalescer = Coalescer(run, length=lambda item: 1, max_batch_size=1, max_batch_tokens=1)
        first, second = (asyncio.create_task(submit(coalescer, item)) for item in (1, 2))
        with pytest.raises(RuntimeError, match=type(error).__name__):
            await first
        assert await second == 2
        await coalescer.close()

    asyncio.run(main())


def test_a_wrong_number_of_results_is_an_error() -> None:
    async def main() -> None:
        coalescer = Coalescer(lambda items: items[1:], length=lambda item: 1, max_batch_size=8, max_batch_tokens=8)
        with pytest.raises(ValueError, match="0 results for 1 items"):
            await submit(coalescer, 1)
        await coalescer.close()

    asyncio.run(main())


def test_close_cancels_who_waits() -> None:
    async def main() -> None:
        machine = Machine(free=False)
        coalescer, _ = make(machine, 1)
        waiting = [asyncio.create_task(submit(coalescer, item)) for item in range(3)]
        await until_started(machine)
        await coalescer.close()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 3
        machine.let.release(10)

    asyncio.run(main())


@dataclass
class Story:
    """A coalescer under a script of events, beside a plain account of what must be queued and running."""

    machine: Machine = field(default_factory=lambda: Machine(free=False))
    calls: list[tuple[asyncio.Task[list[int]], list[int]]] = field(default_factory=list)
    missing: list[set[int]] = field(default_factory=list)
    queued: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    fresh: Counter[int] = field(default_factory=Counter)
    cancelled: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.coalescer, self.heard = make(self.machine, 3, max_batch_tokens=8, length=length_of)

    async def submit(self, items: list[int]) -> None:
        self.calls.append((asyncio.create_task(self.coalescer.submit_all(items)), items))
        self.missing.append(set(items))
        for item in dict.fromkeys(items):
            if item not in self.queued and item not in self.running:
                self.queued.append(item)
                self.fresh[item] += 1
        await settle()
        await self.look()

    async def cancel(self, number: int) -> None:
        if not self.calls:
            return
        task, _ = self.calls[number % len(self.calls)]
        if not task.done():
            self.cancelled.add(number % len(self.calls))
            self.missing[number % len(self.calls)].clear()
        task.cancel()
        await settle()
        self.queued = [item for item in self.queued if any(item in missing for missing in self.missing)]

    async def step(self) -> None:
        """The batch under way ends, and the next one begins."""
        if self.running:
            for missing in self.missing:
                missing.difference_update(self.running)
            self.running = []
            self.machine.let.release()
            if not self.queued:
                await until_empty(self.coalescer)
            await self.look()

    async def look(self) -> None:
        """What runs is what should."""
        if self.queued and not self.running:
            await until_started(self.machine)
            batch = self.machine.batches[-1]
            assert batch[0] == self.queued[0], "somebody has waited longer"
            assert set(batch) <= set(self.queued)
            assert len({length_of(item) for item in batch}) == 1
            assert len(batch) == 1 or sum(map(length_of, batch)) <= 8
            assert len(batch) <= 3
            self.running = batch
            self.queued = [item for item in self.queued if item not in batch]
        self.coalescer.check_integrity()
        assert self.heard.load in (self.coalescer.queued_tokens, -1), "who listens knows the load"
        assert self.coalescer.queued_tokens == sum(map(length_of, [*self.queued, *self.running]))


EVENTS = st.one_of(
    st.tuples(st.just("submit"), st.lists(st.integers(0, 11), min_size=1, max_size=4)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("step"), st.none()),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_any_story_ends_well(events: list[tuple[str, object]]) -> None:
    """Whatever is submitted and cancelled in whatever order: everyone has a result or a cancellation, batches keep
    their bounds, the oldest goes first, and nothing is computed for nobody, or twice at once."""

    async def main() -> None:
        story = Story()
        for name, argument in events:
            await (story.step() if name == "step" else getattr(story, name)(argument))
        while story.running:
            await story.step()
        results = await asyncio.gather(*(task for task, _ in story.calls), return_exceptions=True)
        for number, (result, (_, items)) in enumerate(zip(results, story.calls, strict=True)):
            if number in story.cancelled:
                assert isinstance(result, asyncio.CancelledError)
            else:
                assert result == [item * 10 for item in items]
        ran = Counter(item for batch in story.machine.batches for item in batch)
        assert ran + Counter(story.heard.dropped) == story.fresh
        await story.coalescer.close()

    asyncio.run(main())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(BAD, 5), min_size=1, max_size=3), min_size=1, max_size=8))
def test_only_who_asked_for_a_bad_item_fails(requests: list[list[int]]) -> None:
    async def main() -> None:
        coalescer, _ = make(Machine())
        results = await asyncio.gather(*map(coalescer.submit_all, requests), return_exceptions=True)
        for items, result in zip(requests, results, strict=True):
            if BAD in items:
                assert isinstance(result, ArithmeticError)
            else:
                assert result == [item * 10 for item in items]
        await until_empty(coalescer)
        coalescer.check_integrity()
        await coalescer.close()

    asyncio.run(main())
