"""Replicas for the work that there is: which placement it falls to, and how many of its replicas that takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

FULL = 0.8
"""Share of its time at work up to which a replica keeps up with what arrives: beyond it, queues grow fast."""
_ROUNDING = 1e-9
"""Shares that add up to a whole replica but for the last bits are no further replica."""


@dataclass(frozen=True, slots=True)
class Band:
    """Work of one model on images of more than `above` and at most `upto` pixels, in predicted milliseconds of a
    replica: what waits, and what is left of the jobs in hand. `jobs` counts both.

    `rate` is what arrived lately, in such milliseconds a millisecond: the replicas that have no rest with it.
    `above_mb` are the jobs that ran out of so much memory (1e6 bytes), 0 all others.
    """

    above: int
    upto: int
    queued_ms: float = 0.0
    held_ms: float = 0.0
    jobs: int = 0
    rate: float = 0.0
    above_mb: int = 0

    @property
    def backlog_ms(self) -> float:
        """A job counts, however little is left of it."""
        return max(self.queued_ms + self.held_ms, float(self.jobs > 0))


@dataclass(frozen=True, slots=True)
class Place:
    """A placement. `pace` is what a predicted millisecond really takes there. A job that ran out of less than
    `outdone_mb` may be tried there (`serve.jobs.records.outdone` of its memory; 0 where that is not known)."""

    name: str
    model: str
    max_pixels: int
    min_replicas: int
    max_replicas: int
    target_wait_s: float = 30.0
    pace: float = 1.0
    outdone_mb: int = 0

    @property
    def target_ms(self) -> float:
        """Predicted milliseconds of backlog that one replica may have."""
        return 1000 * self.target_wait_s / self.pace

    @property
    def full_rate(self) -> float:
        """Arriving work that one replica keeps up with."""
        return FULL / self.pace


def desired(places: Sequence[Place], bands: Mapping[str, Sequence[Band]]) -> dict[str, int]:
    """Replicas by placement with which nobody's backlog is beyond the target, as far as `max_replicas` goes; `bands` by
    model, as of this moment. `steady.Steady` makes a decision of it.

    Work falls to what is there in any case, the `min_replicas` of the placements that hold it; what these can't do
    within the target falls to the smallest placement that holds it, and what that can't, at its most replicas, to the
    next larger. So does any work at all wake a placement, unless one that holds it never sleeps and has the time.
    """
    return _replicas(places, bands, lambda band: band.backlog_ms, lambda place: place.target_ms)


def carried(places: Sequence[Place], bands: Mapping[str, Sequence[Band]]) -> dict[str, int]:
    """Replicas by placement that what arrives takes, at FULL. Who shrinks goes no lower while there is work: by
    backlog alone, a placement with enough replicas looks idle, loses one, and grows again."""
    return _replicas(places, bands, lambda band: band.rate, lambda place: place.full_rate)


def _replicas(
    places: Sequence[Place],
    bands: Mapping[str, Sequence[Band]],
    work_of: Callable[[Band], float],
    room_of: Callable[[Place], float],
) -> dict[str, int]:
    """`room_of` is how much of the work a replica takes."""
    load = dict.fromkeys((place.name for place in places), 0.0)
    for model, its in bands.items():
        # Largest first: the larger the image, the fewer the placements that it can go to.
        for band in sorted(its, key=lambda band: (band.upto, band.above_mb), reverse=True):
            left = work_of(band)
            able = _able(places, model, band)
            for bound in (_least, _most):
                for place in able:
                    taken = min(left, max(0.0, bound(place) * room_of(place) - load[place.name]))
                    load[place.name] += taken
                    left -= taken
    return {place.name: _clipped(load[place.name] / room_of(place), place) for place in places}


def _able(places: Sequence[Place], model: str, band: Band) -> list[Place]:
    """Smallest first. Where no card has more than the jobs ran out of, they are tried on any again."""
    held = [place for place in places if place.model == model and place.max_pixels >= band.upto]
    larger = [place for place in held if band.above_mb < place.outdone_mb] if band.above_mb else held
    return sorted(larger or held, key=lambda place: (place.max_pixels, place.outdone_mb))


def _least(place: Place) -> int:
    return place.min_replicas


def _most(place: Place) -> int:
    return place.max_replicas


def _clipped(replicas: float, place: Place) -> int:
    return min(max(math.ceil(replicas - _ROUNDING), place.min_replicas), place.max_replicas)
