"""Timed windows of forwards, with what other processes took of the processors in each of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from serve.bench.machine import OtherWork
from serve.bench.stats import Spread
from serve.encoders.forward import Row, TextTower

DISTURBED = 0.05
"""The share of the processors in other processes from which on a window is measured again, and a figure in doubt."""
_REDONE = 6
"""Windows that one budget's measurements may take again: a machine that is never quiet must not double a run."""
_FEW = 3

TokenRow = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """`windows` repeated windows of `window_s` each, in forwards of at most about `longest_s`."""

    windows: int
    window_s: float
    longest_s: float


@dataclass(frozen=True, slots=True)
class Window:
    """Rows a second, and the share of the processors that other processes had meanwhile."""

    rows_per_s: float
    others: float


class Spare:
    """How many disturbed windows may still be measured again."""

    def __init__(self, windows: int = _REDONE) -> None:
        self._left = windows

    def take(self) -> bool:
        self._left -= 1
        return self._left >= 0


class Series:
    """The windows of forwards that are alike. The first forward, which warms up, is no part of any.

    A window is at least one forward, and slow forwards get fewer windows. Only the encoder's own time counts.
    """

    def __init__(self, tower: TextTower, batches: Iterator[Sequence[TokenRow]], budget: Budget, spare: Spare) -> None:
        """`batches` gives the rows of each forward."""
        self._tower = tower
        self._batches = batches
        self._budget = budget
        self._spare = spare
        warm_up = self._forward()[1]
        windows = budget.windows if warm_up < budget.window_s else _FEW if warm_up < budget.longest_s else 1
        self._wanted = min(windows, budget.windows)
        self._windows: list[Window] = []

    @property
    def done(self) -> bool:
        return len(self._windows) >= self._wanted

    @property
    def rows_per_s(self) -> Spread:
        return Spread.of([window.rows_per_s for window in self._windows])

    @property
    def others(self) -> float:
        """The median over the windows, as the rate is: where fewer than half were disturbed, the median rate lies among
        those of undisturbed ones."""
        return median(window.others for window in self._windows)

    def measure(self) -> None:
        """One more window. A disturbed one is measured again while there is any to spare; the quietest counts."""
        tried = [self._window()]
        while tried[-1].others > DISTURBED and self._spare.take():
            tried.append(self._window())
        self._windows.append(min(tried, key=lambda window: window.others))

    def _window(self) -> Window:
        done, seconds = 0, 0.0
        with (others := OtherWork()):
            while seconds < self._budget.window_s:
                computed, took = self._forward()
                done, seconds = done + computed, seconds + took
        return Window(done / seconds, others.share or 0.0)

    def _forward(self) -> tuple[int, float]:
        """Rows and seconds of one forward. The embeddings come back to the CPU, so that a GPU has finished."""
        rows = [Row(ids) for ids in next(self._batches)]
        began = time.perf_counter()
        self._tower.encode(rows)
        return len(rows), time.perf_counter() - began


def in_turns(series: Sequence[Series]) -> None:
    """One window of each in turn until all are done, so that what disturbs the machine hits all alike."""
    while waiting := [one for one in series if not one.done]:
        for one in waiting:
            one.measure()
