"""Batching without a window: whoever is free takes what is queued.

A batch grows while the one before it runs, so that its size follows the load: alone, an item starts at once; under
load, batches are full. (`@serve.batch` cuts a batch by a clock, and collapses when a batch runs longer than its wait.)
"""

from __future__ import annotations

import asyncio
import itertools
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False, slots=True)
class _Entry(Generic[Item, Result]):
    """An item that is queued or running. `number` is its place in the order of arrival."""

    item: Item
    length: int
    number: int
    waiters: set[asyncio.Future[Result]] = field(default_factory=set)


def _ignore(*_: Any) -> None:
    """For callers that don't listen."""


class Coalescer(Generic[Item, Result]):
    """Runs `run_batch(items)` in a thread, one batch at a time. Belongs to one event loop.

    A batch is the item that has waited longest and others of its length (tokens), so that no row is padded for the
    sake of another; it holds at most `max_batch_size` items and `max_batch_tokens` tokens, and a longer item goes
    alone. An item that is queued or running already isn't computed again: its result is shared. An item that all its
    callers have left is dropped before it runs, and `on_dropped` hears of it; one that they left while it ran is handed
    to `on_unclaimed` with its result. `on_load` hears `queued_tokens` when items came, left or ended. All three are
    called in the event loop.

    A batch that fails is tried again in halves, unless its error is one of `fatal`: then nothing more can run.

    Owns: the queue, and the one thread that `run_batch` runs in.
    """

    def __init__(
        self,
        run_batch: Callable[[list[Item]], Sequence[Result]],
        *,
        length: Callable[[Item], int],
        max_batch_size: int,
        max_batch_tokens: int,
        on_dropped: Callable[[Item], None] = _ignore,
        on_unclaimed: Callable[[Item, Result], None] = _ignore,
        on_load: Callable[[int], None] = _ignore,
        fatal: tuple[type[Exception], ...] = (),
    ) -> None:
        self._run_batch = run_batch
        self._length = length
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._on_dropped = on_dropped
        self._on_unclaimed = on_unclaimed
        self._on_load = on_load
        self._fatal = fatal
        self._numbers = itertools.count()
        self._queued: dict[int, dict[Item, _Entry[Item, Result]]] = {}
        self._running: dict[Item, _Entry[Item, Result]] = {}
        self._tokens = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._runner: asyncio.Task[None] | None = None

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for a batch or are in it."""
        return self._tokens

    async def submit_all(self, items: Sequence[Item]) -> list[Result]:
        """Results in order. Items that are submitted together share a batch where it has room for them.

        Raises what `run_batch` raised for one of them.
        """
        loop = asyncio.get_running_loop()
        joined = [(self._enter(item), loop.create_future()) for item in items]
        for entry, future in joined:
            entry.waiters.add(future)
        if joined and (self._runner is None or self._runner.done()):
            self._runner = loop.create_task(self._run())
        self._on_load(self._tokens)
        try:
            return list(await asyncio.gather(*(future for _, future in joined)))
        finally:
            for entry, future in joined:
                entry.waiters.discard(future)
            self._drop_left([entry for entry, _ in joined])

    async def close(self) -> None:
        """Everyone who waits is cancelled; the batch under way ends by itself."""
        if self._runner:
            self._runner.cancel()
        for entry in [*self._running.values(), *self._waiting()]:
            for future in entry.waiters:
                future.cancel()
        self._thread.shutdown(wait=False)

    def check_integrity(self) -> None:
        queued = list(self._waiting())
        assert all(self._queued.values()), "an empty bucket is kept"
        assert all(entry.waiters for entry in queued), "an item that nobody waits for is kept"
        assert not self._running.keys() & {entry.item for entry in queued}, "an item is queued while it runs"
        assert self._tokens == sum(entry.length for entry in [*queued, *self._running.values()])

    def _waiting(self) -> Iterator[_Entry[Item, Result]]:
        return (entry for bucket in self._queued.values() for entry in bucket.values())

    def _enter(self, item: Item) -> _Entry[Item, Result]:
        length = self._length(item)
        entry = self._running.get(item) or self._queued.get(length, {}).get(item)
        if entry is None:
            entry = _Entry(item, length, next(self._numbers))
            self._queued.setdefault(length, {})[item] = entry
            self._tokens += length
        return entry

    def _drop_left(self, entries: Sequence[_Entry[Item, Result]]) -> None:
        before = self._tokens
        for entry in entries:
            if not entry.waiters and self._queued.get(entry.length, {}).get(entry.item) is entry:
                self._take(entry)
                self._tokens -= entry.length
                self._on_dropped(entry.item)
        if self._tokens != before:
            self._on_load(self._tokens)

    def _take(self, entry: _Entry[Item, Result]) -> None:
        bucket = self._queued[entry.length]
        del bucket[entry.item]
        if not bucket:
            del self._queued[entry.length]

    def _cut(self) -> list[_Entry[Item, Result]]:
        """The next batch. Each bucket is in order of arrival, so that its first item is its oldest."""
        if not self._queued:
            return []
        bucket = min(self._queued.values(), key=lambda bucket: next(iter(bucket.values())).number)
        length = next(iter(bucket.values())).length
        most = max(1, min(self._max_batch_size, self._max_batch_tokens // max(1, length)))
        batch = list(itertools.islice(bucket.values(), most))
        for entry in batch:
            self._take(entry)
            self._running[entry.item] = entry
        return batch

    async def _run(self) -> None:
        while batch := self._cut():
            try:
                await self._attempt(batch)
            finally:
                for entry in batch:  # left over only where this task is cancelled
                    for future in self._settle(entry):
                        future.cancel()
                self._on_load(self._tokens)

    async def _attempt(self, batch: Sequence[_Entry[Item, Result]]) -> None:
        """Run them. A batch that fails is tried again in halves: one bad item must not fail strangers, and what was
        too much for the device's memory may fit."""
        items = [entry.item for entry in batch]
        results = await asyncio.get_running_loop().run_in_executor(self._thread, self._outcome, items)
        if not isinstance(results, Exception):
            for entry, result in zip(batch, results, strict=True):
                self._land(entry, result)
        elif len(batch) == 1 or isinstance(results, self._fatal):
            for entry in batch:
                for future in self._settle(entry):
                    future.set_exception(results)
        else:
            middle = len(batch) // 2
            await self._again(batch[:middle])
            await self._again(batch[middle:])

    async def _again(self, batch: Sequence[_Entry[Item, Result]]) -> None:
        for entry in batch:
            if not entry.waiters:
                self._settle(entry)
                self._on_dropped(entry.item)
        if left := [entry for entry in batch if entry.waiters]:
            await self._attempt(left)

    def _land(self, entry: _Entry[Item, Result], result: Result) -> None:
        waiting = self._settle(entry)
        for future in waiting:
            future.set_result(result)
        if not waiting:
            self._on_unclaimed(entry.item, result)

    def _settle(self, entry: _Entry[Item, Result]) -> list[asyncio.Future[Result]]:
        """The item runs no more: whoever asks for it from now on starts afresh. Who still waits for it."""
        if self._running.get(entry.item) is entry:
            del self._running[entry.item]
            self._tokens -= entry.length
        return [future for future in entry.waiters if not future.done()]

    def _outcome(self, items: list[Item]) -> Sequence[Result] | Exception:
        """In the thread. Errors are values here: asyncio would take some of them for a cancellation, or for its own."""
        try:
            results = self._run_batch(items)
            if len(results) != len(items):
                raise ValueError(f"{len(results)} results for {len(items)} items")
        except BaseException as error:  # noqa: BLE001 -- it belongs to the callers of this batch
            _let_go(error)
            if isinstance(error, Exception) and not isinstance(error, StopIteration):
                return error
            return RuntimeError(f"{type(error).__name__} in a batch")
        return results


def _let_go(error: BaseException) -> None:
    """Empty the frames that the error and its causes point to: they hold the failed batch's tensors, and the halves of
    a batch that did not fit are tried while the error is kept."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
