"""Simulated time: what is due, in order."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class Clock:
    """Milliseconds since the simulation began. Of what is due at the same moment, what was asked for first goes first.

    Owns: the calls that are due.
    """

    def __init__(self) -> None:
        self.now_ms = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    @property
    def next_ms(self) -> float:
        """When the next call is due; infinite where none is."""
        return self._due[0][0] if self._due else float("inf")

    def at(self, ms: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (max(ms, self.now_ms), next(self._numbers), call))

    def step(self) -> None:
        """Go to the next call and make it."""
        self.now_ms, _, call = heapq.heappop(self._due)
        call()

    def go(self, ms: float) -> None:
        """Nothing is due before then."""
        self.now_ms = ms
