"""What each part of the server says of itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from serve.errors import TandemError

READY_S = 1.0
"""For so long what the parts said of themselves is told again, from when they were asked."""
_PROBE_S = 2.0


@dataclass(frozen=True, slots=True)
class PoolState:
    ready: bool
    detail: str


Probe = Callable[[], Awaitable[PoolState]]


class Readiness:
    """Asks the parts how they are, once in READY_S, however many want to know: whoever reaches the server may.

    Owns: the task that asks.
    """

    def __init__(self, pools: Mapping[str, Probe]) -> None:
        self._pools = pools
        self._asking: asyncio.Task[dict[str, PoolState]] | None = None
        self._asked_at = 0.0

    async def states(self) -> dict[str, PoolState]:
        """By pool; a part that fails to answer is not ready."""
        asking = self._asking
        if asking is None or (asking.done() and time.monotonic() - self._asked_at >= READY_S):
            self._asked_at = time.monotonic()
            asking = self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(asking)

    def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()

    async def _ask(self) -> dict[str, PoolState]:
        states = await asyncio.gather(*map(_asked, self._pools.values()))
        return dict(zip(self._pools, states, strict=True))


async def _asked(probe: Probe) -> PoolState:
    try:
        async with asyncio.timeout(_PROBE_S):
            return await probe()
    except TimeoutError:
        return PoolState(False, "does not answer")
    except TandemError as error:
        return PoolState(False, error.message)
