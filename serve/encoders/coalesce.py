"""Batching without a window: whoever is free takes what is queued.

A batch grows while the one before it runs, so that its size follows the load: alone, an item starts at once; under
load, batches are full. (`@serve.batch` cuts a batch by a clock, and collapses when a batch runs longer than its wait.)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Coalescer(Generic[Item, Result]):
    """Runs `run_batch(items)` in a thread, one batch at a time, first come first served. Belongs to one event loop.

    Owns: the queue, and the one thread that `run_batch` runs in.
    """

    def __init__(self, run_batch: Callable[[list[Item]], Sequence[Result]], max_batch_size: int) -> None:
        self._run_batch = run_batch
        self._max_batch_size = max_batch_size
        self._queue: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._running: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """The item's result. Raises what its batch raised."""
        return (await self.submit_all([item]))[0]

    async def submit_all(self, items: Sequence[Item]) -> list[Result]:
        """Results in order. Items that are submitted together share a batch where it has room for them."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        self._queue.extend(zip(items, futures, strict=True))
        if self._running is None or self._running.done():
            self._running = loop.create_task(self._run())
        return list(await asyncio.gather(*futures))

    async def close(self) -> None:
        """Everyone who waits is cancelled; the batch under way ends by itself."""
        if self._running:
            self._running.cancel()
        for _, future in self._queue:
            future.cancel()
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        while batch := self._take():
            items, futures = zip(*batch, strict=True)
            try:
                results = await asyncio.get_running_loop().run_in_executor(self._thread, self._run_batch, list(items))
                if len(results) != len(items):
                    raise ValueError(f"{len(results)} results for {len(items)} items")
            except asyncio.CancelledError:
                for future in futures:
                    future.cancel()
                raise
            except Exception as error:  # noqa: BLE001 -- it belongs to the callers of this batch, the next one is theirs no more
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
                continue
            for future, result in zip(futures, results, strict=True):
                if not future.done():
                    future.set_result(result)

    def _take(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        """The longest waiting items whose callers still wait."""
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._queue and len(batch) < self._max_batch_size:
            item, future = self._queue.popleft()
            if not future.done():
                batch.append((item, future))
        return batch
