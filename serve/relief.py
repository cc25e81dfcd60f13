"""How a job fares for memory, over its attempts, and where it goes when there is none left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from serve.domain.jobs import MemoryReport, Relief
from serve.jobs.records import Marks, outdone
from serve.jobs.terms import WorkerReport
from serve.placements import Placement
from serve.rungs import Rung

AGED_S = 30.0
"""A job that has waited for so long goes before what a replica would rather take: every waiting has an end. Where it
waits for more memory than any card has, it is anybody's then."""
STARTING_S = 300.0
"""In which a placement without a living replica may get one: a node with a GPU comes in minutes."""
STARTING_SHARE = 0.25
"""Of a job's time, the most of that: it must be tried again while it still has time to be drawn."""
KEPT = 32
"""Measures that a job's record tells of; further ones are counted."""


@dataclass(frozen=True, slots=True)
class Card:
    """Of another placement or living replica: its memory in units of 1e6 bytes, and the largest image drawn there."""

    memory_mb: int
    max_pixels: int


@dataclass(slots=True)
class Cards:
    """What this replica has of its card (0 where it is not known), in units of 1e6 bytes, and the cards of the same
    model.

    `planned` is the settings' word, `alive` the job store's; the worker hears it anew every few seconds. More memory is
    of use to a job where it draws images of the job's size: the largest image is that of a card's rung, and a large
    card on a good rung may well take smaller ones than a small card on a bad one.
    """

    own: int = 0
    planned: Sequence[Card] = ()
    alive: Sequence[Card] = ()
    timeout_s: float = 4 * STARTING_S

    def larger(self, pixels: int) -> bool:
        """Whether there is a card with more for images of so many pixels, be it that none of its replicas lives just
        now."""
        return self.own > 0 and pixels <= max(self._reach(self.planned), self._reach(self.alive))

    @property
    def marks(self) -> Marks:
        """How long a job that ran out of as much memory waits for a larger card before this replica tries it all the
        same: for ever while one lives, long where one is to come."""
        starting_s = min(STARTING_S, STARTING_SHARE * self.timeout_s)
        return Marks(
            alive=self._reach(self.alive),
            coming=self._reach(self.planned),
            coming_s=starting_s,
            rest_s=min(AGED_S, starting_s),
        )

    def _reach(self, cards: Sequence[Card]) -> int:
        """The largest image that one with more memory draws."""
        return max((each.max_pixels for each in cards if self.own < outdone(each.memory_mb)), default=0)


def memory_mb(placement: Placement) -> int:
    return placement.memory_bytes // 10**6


def cards_of(placement: Placement, placements: Sequence[Placement], timeout_s: float) -> Cards:
    """`placements` are those of the settings; after `timeout_s` a job that was begun ends."""
    others = (each for each in placements if each.model == placement.model)
    planned = tuple(Card(memory_mb(each), each.max_pixels) for each in others)
    return Cards(own=memory_mb(placement), planned=planned, timeout_s=timeout_s)


def living(reports: Iterable[WorkerReport]) -> tuple[Card, ...]:
    """`Cards.alive`, of what the workers of a model have told."""
    return tuple(Card(each.memory_mb, each.max_pixels) for each in reports)


class Fortune:
    """Of one attempt. `relieved` is called on the engine's thread, the rest on the event loop, before or after that.

    Owns: what was done about memory that ran out.
    """

    def __init__(self, before: MemoryReport | None) -> None:
        self._before = before or MemoryReport()
        self._told: list[Relief] = []

    def relieved(self, relief: Relief) -> None:
        self._told.append(relief)

    def drawn(self, rung: Rung) -> MemoryReport:
        """The images are there."""
        return replace(self._report, rung=rung)

    def gives_back(self, cards: Cards, pixels: int) -> MemoryReport:
        """The attempt at images of so many pixels ends for lack of memory: the job is for a placement with more, where
        there is one."""
        larger = cards.larger(pixels)
        self._told.append(Relief("job", "another_card" if larger else "another_time"))
        report = self._report
        return replace(report, above_mb=max(cards.own, report.above_mb or 0)) if larger else report

    @property
    def news(self) -> MemoryReport | None:
        """None where nothing was done in this attempt: what is known of the job stays as it is."""
        return self._report if self._told else None

    @property
    def _report(self) -> MemoryReport:
        before, told = self._before, tuple(self._told)
        return replace(before, retries=before.retries + len(told), relief=(before.relief + told)[:KEPT])
