"""The arithmetic of measuring: arrival times, percentiles, medians with their spread. No clock, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The median of `count` repeated windows and the extremes among them, in the unit of what was measured."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError for no values."""
        if not values:
            raise ValueError("a spread of nothing")
        return cls(median=float(np.median(values)), low=min(values), high=max(values), count=len(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Seconds, over all `count` samples, linear between neighbours (numpy's default)."""

    count: int
    p50: float
    p95: float
    p99: float
    worst: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        """Raises ValueError for no samples."""
        if not seconds:
            raise ValueError("percentiles of nothing")
        p50, p95, p99 = (float(value) for value in np.percentile(seconds, (50, 95, 99)))
        return cls(count=len(seconds), p50=p50, p95=p95, p99=p99, worst=max(seconds))


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times in [0, seconds) at which requests of a Poisson process of `rate` a second arrive; the same for a seed.

    The number is fixed at rate * seconds, at least one, and given the number the times of a Poisson process are
    independent and uniform (Ross, Introduction to Probability Models, section 5.3.5): no run is offered more than
    another. Raises ValueError for a rate or a time that is not above 0.
    """
    if rate <= 0 or seconds <= 0:
        raise ValueError(f"{rate} requests a second for {seconds} s")
    count = max(1, round(rate * seconds))
    return sorted(float(time) for time in np.random.default_rng(seed).uniform(0.0, seconds, count))
