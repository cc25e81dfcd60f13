"""How much work arrives, averaged."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

SPAN_S = 60.0
"""Seconds after which what arrived counts for a third."""


class Rates:
    """Milliseconds of work that arrive a millisecond, by whatever they are told apart: an exponential average, which
    begins at 0.

    Owns: those averages, and when they were as they are.
    """

    def __init__(self, span_s: float = SPAN_S) -> None:
        self._span_s = span_s
        self._rates: dict[Hashable, float] = {}
        self._at_s: float | None = None

    def add(self, now_s: float, arrived_ms: Mapping[Hashable, float]) -> None:
        """`arrived_ms` came since the last call."""
        kept = 1.0 if self._at_s is None else math.exp(-max(0.0, now_s - self._at_s) / self._span_s)
        self._at_s = now_s
        for key in self._rates:
            self._rates[key] *= kept
        for key, ms in arrived_ms.items():
            self._rates[key] = self._rates.get(key, 0.0) + ms / (1000 * self._span_s)

    def of(self, key: Hashable) -> float:
        return self._rates.get(key, 0.0)
