"""Percentiles that requests without a result count in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.samples import Outcome, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """Seconds from the intended send time, over `count` requests. A request that got no picture took for ever, so that
    no server is the quicker for what it dropped: None is a percentile among those."""

    count: int
    p50: float | None
    p95: float | None
    p99: float | None
    worst: float | None

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Tail:
        done = sorted(sample.latency_s for sample in samples if sample.outcome is Outcome.DONE)
        p50, p95, p99, worst = (_quantile(done, len(samples), share) for share in (0.5, 0.95, 0.99, 1.0))
        return cls(count=len(samples), p50=p50, p95=p95, p99=p99, worst=worst)


def _quantile(done: Sequence[float], count: int, share: float) -> float | None:
    """Linear between neighbours, as numpy's default; of `count` values, those that are not in `done` endless."""
    place = share * (count - 1)
    below = int(place)
    above = min(below + 1, count - 1) if place > below else below
    if not count or above >= len(done):
        return None
    return done[below] + (done[above] - done[below]) * (place - below)
