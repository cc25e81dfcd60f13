"""How many rows a second one encoder computes, one by one and in batches, and what the machine allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Literal

import torch

from serve.bench.machine import Peaks
from serve.bench.shapes import EncoderShape
from serve.bench.stats import Spread
from serve.bench.texts import random_row
from serve.bench.windows import DISTURBED, Budget, Series, Spare, TokenRow, in_turns
from serve.encoders.forward import TextTower

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
PAYS = 1.03
"""A batch size pays where it is faster than the best smaller one by this factor."""
BAR = 5.0
"""How many times as fast as one by one the product wants batches to be."""
_AGREES = 1.3
"""One by one may take this much longer than a request to the idle pool, which does more: else one of them is wrong."""

Limit = Literal["none", "arithmetic", "overhead"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows a second in forwards of `size` rows. `others` is the share of the processors that other processes had."""

    size: int
    rows_per_s: Spread
    others: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """`batches` in order of size, the first of one row. `peak_flops` is the machine's best matrix product in this
    dtype, in operations a second; `stopped` says why no larger batch was tried; `idle_s` is what a request to the idle
    pool took (median), None where that was not measured."""

    encoder: str
    dtype: str
    row_tokens: int
    flop_per_row: int
    peak_flops: float
    batches: tuple[Batch, ...]
    stopped: str
    idle_s: float | None = None

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

    @property
    def doubt(self) -> str:
        """Why the rates and their ratio can't be believed; empty where they can."""
        others = max(self.batches[0].others, self.best.others)
        if others > DISTURBED:
            return f"disturbed: other processes took {others:.0%} of the processors"
        if self.idle_s is not None and 1 / self.single > _AGREES * self.idle_s:
            return (
                f"one by one took {1e3 / self.single:,.0f} ms, a request to the idle pool {1e3 * self.idle_s:,.0f} ms"
            )
        return ""


def measure_throughput(
    tower: TextTower, shape: EncoderShape, dtype: str, peaks: Peaks, budget: Budget, seed: int
) -> Throughput:
    """Batches of 1, 2, 4 ... rows, until two sizes in a row don't pay, a forward takes too long, or the memory does not
    hold it; then all of these in turns. No two rows are the same, so that every row is computed."""
    peak_before = peaks.look(dtype)
    fresh = (random_row(shape, seed, index) for index in count())
    series, stopped = _tried_sizes(tower, fresh, budget)
    in_turns(list(series.values()))
    return Throughput(
        encoder=shape.name,
        dtype=dtype,
        row_tokens=shape.row_tokens,
        flop_per_row=shape.flop_per_row,
        peak_flops=max(peak_before, peaks.look(dtype)),
        batches=tuple(Batch(size=size, rows_per_s=one.rows_per_s, others=one.others) for size, one in series.items()),
        stopped=stopped,
    )


def _tried_sizes(tower: TextTower, rows: Iterator[TokenRow], budget: Budget) -> tuple[dict[int, Series], str]:
    """The sizes that are worth measuring, with one window each, and why there is no larger one."""
    series: dict[int, Series] = {}
    spare = Spare()
    for size in SIZES:
        rates = [one.rows_per_s.median for one in series.values()]
        if size > 2 and size / max(rates) > budget.longest_s:
            return series, f"a forward of {size} rows takes longer than {budget.longest_s:g} s"
        try:
            one = Series(tower, batched(rows, size), budget, spare)
            one.measure()
        except torch.OutOfMemoryError:
            return series, f"the memory does not hold {size} rows"
        series[size] = one
        if _no_gain([*rates, one.rows_per_s.median]):
            return series, "larger batches don't pay"
    return series, f"{SIZES[-1]} rows are the most that is tried"


def batched(rows: Iterator[TokenRow], size: int) -> Iterator[list[TokenRow]]:
    """The next `size` rows, again and again."""
    while batch := list(islice(rows, size)):
        yield batch


def _no_gain(rates: Sequence[float]) -> bool:
    """Whether neither of the two largest sizes is faster than the best before it by `PAYS`."""
    return len(rates) > 2 and all(rates[at] <= PAYS * max(rates[:at]) for at in (-1, -2))
