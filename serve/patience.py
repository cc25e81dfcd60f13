"""Waiting for one job's sake: for as long as somebody wants it and this replica may still finish it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from serve.errors import Unavailable

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.25
LONGEST_RETRY_S = 5.0
T = TypeVar("T")


class Withdrawn(Exception):
    """The client cancelled the job, or another worker owns it now: nobody waits for this run."""


class GivenBack(Exception):
    """This replica stops and can't wait for what the job needs next: the job returns to the queue."""


class Patience:
    """`gone` is set when nobody waits for the run any more, `stopping` when this replica waits for nothing any more.

    The job's own timeout bounds every waiting here: an expired job's lease is gone, and its pulse says so.
    """

    def __init__(self, gone: asyncio.Event, stopping: asyncio.Event) -> None:
        self._gone = gone
        self._stopping = stopping

    async def repeat(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call once, and again while the backend is away. Raises Withdrawn, or GivenBack where the replica stops."""
        delay_s = FIRST_RETRY_S
        while True:
            try:
                return await call()
            except Unavailable as error:
                log.warning("waiting: %s", error.message)
            self._go_on()
            await first(self._gone.wait(), self._stopping.wait(), asyncio.sleep(delay_s))
            self.wanted()
            delay_s = min(2 * delay_s, LONGEST_RETRY_S)

    async def obtain(self, call: Callable[[], Awaitable[T]]) -> T:
        """`repeat` for what may neither answer nor refuse: the waiting itself is called off, for the same reasons."""
        asking = asyncio.ensure_future(self.repeat(call))
        try:
            await first(asking, self._gone.wait(), self._stopping.wait())
            if not asking.done():
                self._go_on()
            return await asking
        finally:
            asking.cancel()

    async def finish(self, future: asyncio.Future[T]) -> T:
        """What the replica computes itself, which a drain waits for. Raises Withdrawn; the future goes on."""
        if await first(future, self._gone.wait()) is not future:
            raise Withdrawn
        return await future

    def wanted(self) -> None:
        """Raises Withdrawn unless somebody waits for the run."""
        if self._gone.is_set():
            raise Withdrawn

    def _go_on(self) -> None:
        self.wanted()
        if self._stopping.is_set():
            raise GivenBack


async def first(*awaitables: Awaitable[object]) -> Awaitable[object]:
    """Wait for any; the one that was done first, by their order here. The others are cancelled, unless they are
    futures of somebody else's."""
    waiting = [asyncio.ensure_future(each) for each in awaitables]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return next(each for each, future in zip(awaitables, waiting, strict=True) if future.done())
    finally:
        own = [future for each, future in zip(awaitables, waiting, strict=True) if future is not each]
        for future in own:
            future.cancel()
        await asyncio.gather(*own, return_exceptions=True)
