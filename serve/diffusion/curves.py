"""Step times by batch and size: what follows from a few that were measured. Plain Python."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.diffusion.scheduler import LatentShape

WORTH = 0.01
"""What one more guided image must add to throughput for the batch to grow by it. Images that are left out wait for the
next step, so that whatever adds anything serves all of them; less than this is noise."""
LONGEST_MS = 2000.0
"""Longest step that a batch may be given whose time was not measured: others wait that long to join or to leave."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Milliseconds of a step by lanes, for one latent shape, and the most lanes that a step should have there."""

    shape: LatentShape
    ms: Mapping[int, float]
    cap: int

    @property
    def area(self) -> int:
        return area(self.shape)

    def at(self, lanes: float) -> float:
        """Between two measured numbers of lanes on the line between them; beyond the last, as slow per lane as there;
        before the first, as slow as that."""
        known = sorted(self.ms)
        if lanes >= known[-1]:
            return self.ms[known[-1]] * lanes / known[-1]
        place = bisect_left(known, lanes)
        if place == 0:
            return self.ms[known[0]]
        return _between(lanes, known[place - 1], known[place], self.ms[known[place - 1]], self.ms[known[place]])


def area(shape: LatentShape) -> int:
    return shape[0] * shape[1]


def best_lanes(ms: Mapping[int, float]) -> int:
    """The batch beyond which one more image (two lanes) adds less than `WORTH` of throughput, among the measured ones.

    A larger batch is compared with the best so far, not with the next smaller one: one that came out slow by chance
    doesn't hide those behind it.
    """
    known = sorted(ms)
    best = known[0]
    for lanes in known[1:]:
        gain = (lanes / ms[lanes]) / (best / ms[best])
        if gain >= 1 + WORTH * (lanes - best) / 2:
            best = lanes
    return best


def unmeasured_lanes(ms: Mapping[int, float]) -> int:
    """A cap where the time ran out before the best was found: as if batching gained nothing, it costs no throughput,
    and all it may cost is a longer step."""
    last = max(ms)
    return max(best_lanes(ms), int(LONGEST_MS * last / ms[last]))


def step_ms(curves: Sequence[Curve], shape: LatentShape, lanes: int) -> float:
    """`curves` is not empty and in rising order of area. Each curve is read at as many lanes as would be the same load
    (lanes x area) there; between two areas it is in proportion."""
    load = lanes * area(shape)
    return _by_area(curves, area(shape), [curve.at(load / curve.area) for curve in curves])


def cap(curves: Sequence[Curve], shape: LatentShape) -> int:
    """Lanes of a step at any shape, at least 1: the caps' loads between two areas in proportion, beyond them the same
    load. `curves` as above."""
    load = _by_area(curves, area(shape), [float(curve.cap * curve.area) for curve in curves])
    return max(1, int(load / area(shape) + 1e-9))


def _by_area(curves: Sequence[Curve], wanted: int, values: Sequence[float]) -> float:
    place = bisect_left(curves, wanted, key=lambda curve: curve.area)
    if place == 0:
        return values[0]
    if place == len(curves):
        return values[-1]
    return _between(wanted, curves[place - 1].area, curves[place].area, values[place - 1], values[place])


def _between(at: float, low: float, high: float, value_low: float, value_high: float) -> float:
    return value_low + (value_high - value_low) * (at - low) / (high - low)
