"""How many rows a second one encoder computes, one by one and in batches, and what the machine allows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Literal

import torch

from serve.bench.machine import Peaks
from serve.bench.shapes import EncoderShape
from serve.bench.stats import Spread
from serve.bench.texts import random_row
from serve.encoders.forward import Row, TextTower

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
PAYS = 1.03
"""A batch size pays where it is faster than the best smaller one by this factor."""
BAR = 5.0
"""How many times as fast as one by one the product wants batches to be."""
_FEW = 3

Limit = Literal["none", "arithmetic", "overhead"]
TokenRow = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """`windows` repeated windows of `window_s` each, in forwards of at most about `longest_s`."""

    windows: int
    window_s: float
    longest_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows a second in forwards of `size` rows."""

    size: int
    rows_per_s: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """`batches` in order of size, the first of one row. `peak_flops` is the machine's best matrix product in this
    dtype, in operations a second; `stopped` says why no larger batch was tried."""

    encoder: str
    dtype: str
    row_tokens: int
    flop_per_row: int
    peak_flops: float
    batches: tuple[Batch, ...]
    stopped: str

    @property
    def single(self) -> float:
        """Rows a second, one by one."""
        return self.batches[0].rows_per_s.median

    @property
    def best(self) -> Batch:
        """The fastest batch; of one row, where batching loses."""
        return max(self.batches, key=lambda batch: batch.rows_per_s.median)

    @property
    def ratio(self) -> float:
        return self.best.rows_per_s.median / self.single

    @property
    def bound(self) -> float:
        """Rows a second at which the encoder's matrix products alone would take the machine's peak."""
        return self.peak_flops / self.flop_per_row

    def share(self, rows_per_s: float) -> float:
        """The part of the machine's peak that this rate takes."""
        return rows_per_s / self.bound

    @property
    def limit(self) -> Limit:
        """What keeps batches from `BAR` times one by one: arithmetic, where the machine's peak itself is less."""
        if self.ratio >= BAR:
            return "none"
        return "arithmetic" if self.bound / self.single < BAR else "overhead"


def measure_throughput(
    tower: TextTower, shape: EncoderShape, dtype: str, peaks: Peaks, budget: Budget, seed: int
) -> Throughput:
    """Batches of 1, 2, 4 ... rows, until two sizes in a row don't pay, a forward takes too long, or the memory does not
    hold it. No two rows are the same, so that every row is computed."""
    peak_before = peaks.look(dtype)
    fresh = (random_row(shape, seed, index) for index in count())
    batches: list[Batch] = []
    stopped = f"{SIZES[-1]} rows are the most that is tried"
    for size in SIZES:
        best = max((batch.rows_per_s.median for batch in batches), default=0.0)
        if size > 2 and size / best > budget.longest_s:
            stopped = f"a forward of {size} rows takes longer than {budget.longest_s:g} s"
            break
        try:
            rates = rate_windows(tower, batched(fresh, size), budget)
        except torch.OutOfMemoryError:
            stopped = f"the memory does not hold {size} rows"
            break
        batches.append(Batch(size=size, rows_per_s=Spread.of(rates)))
        if _no_gain(batches):
            stopped = "larger batches don't pay"
            break
    return Throughput(
        encoder=shape.name,
        dtype=dtype,
        row_tokens=shape.row_tokens,
        flop_per_row=shape.flop_per_row,
        peak_flops=max(peak_before, peaks.look(dtype)),
        batches=tuple(batches),
        stopped=stopped,
    )


def batched(rows: Iterator[TokenRow], size: int) -> Iterator[list[TokenRow]]:
    """The next `size` rows, again and again."""
    while batch := list(islice(rows, size)):
        yield batch


def rate_windows(tower: TextTower, batches: Iterator[Sequence[TokenRow]], budget: Budget) -> list[float]:
    """Rows a second in each window, after one forward to warm up. `batches` gives the rows of each forward.

    Only the encoder's own time counts. A window is at least one forward, and slow ones get fewer windows.
    """
    warm_up = _forward_seconds(tower, next(batches))[1]
    windows = budget.windows if warm_up < budget.window_s else _FEW if warm_up < budget.longest_s else 1
    rates = []
    for _ in range(min(windows, budget.windows)):
        done, seconds = 0, 0.0
        while seconds < budget.window_s:
            computed, took = _forward_seconds(tower, next(batches))
            done, seconds = done + computed, seconds + took
        rates.append(done / seconds)
    return rates


def _forward_seconds(tower: TextTower, ids: Sequence[TokenRow]) -> tuple[int, float]:
    """Rows and seconds of one forward. The embeddings come back to the CPU, so that a GPU has finished."""
    rows = [Row(row) for row in ids]
    began = time.perf_counter()
    tower.encode(rows)
    return len(rows), time.perf_counter() - began


def _no_gain(batches: Sequence[Batch]) -> bool:
    """Whether neither of the two largest sizes is faster than the best before it by `PAYS`."""
    rates = [batch.rows_per_s.median for batch in batches]
    return len(rates) > 2 and all(rates[at] <= PAYS * max(rates[:at]) for at in (-1, -2))
