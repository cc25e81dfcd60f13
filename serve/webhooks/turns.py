"""Whose call is made when: few at a time to each host, so that a slow one does not hold the others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from weakref import WeakValueDictionary

CALLS, CALLS_A_HOST = 16, 2
IN_HAND, IN_HAND_A_HOST = 256, 32
"""Jobs that are called about or wait for that. As many slow hosts fill the one as fill the other."""
_BACK_A_S = 32
"""Of one host's that found no place, those that come back in a second: a long backlog costs the store little."""


class Crowded(Exception):
    """Too many others are to be told at that host; `delay_s` says when to look again. No call was made."""

    def __init__(self, delay_s: float) -> None:
        super().__init__(f"again in {delay_s:.1f} s")
        self.delay_s = delay_s


@dataclass(eq=False)
class _Host:
    """`held` counts those that are called about or wait, `back_at` is when, on the loop's clock, the last of those that
    found no place comes back."""

    turns: asyncio.Semaphore
    held: int = 0
    back_at: float = 0.0


class Turns:
    """Owns: the places of this process. A host is forgotten when nobody has one there."""

    def __init__(self, wait_s: float, later_s: float) -> None:
        """`wait_s` is how long a turn is waited for, `later_s` when what found none comes back at the earliest."""
        self._wait_s = wait_s
        self._later_s = later_s
        self._calls = asyncio.Semaphore(CALLS)
        self._hosts: WeakValueDictionary[str, _Host] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def at(self, name: str) -> AsyncIterator[None]:
        """One call's turn at a host. Crowded."""
        host = self._hosts.setdefault(name, _Host(asyncio.Semaphore(CALLS_A_HOST)))
        if host.held >= IN_HAND_A_HOST:
            raise self._crowded(host)
        host.held += 1
        try:
            async with contextlib.AsyncExitStack() as turn:
                try:
                    async with asyncio.timeout(self._wait_s):
                        await turn.enter_async_context(host.turns)
                        await turn.enter_async_context(self._calls)
                except TimeoutError:
                    raise self._crowded(host) from None
                yield
        finally:
            host.held -= 1

    def _crowded(self, host: _Host) -> Crowded:
        now = asyncio.get_running_loop().time()
        host.back_at = max(host.back_at, now + self._later_s) + 1 / _BACK_A_S
        return Crowded(host.back_at - now)
