"""How a job fares for memory, over its attempts, and where it goes when there is none left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from serve.domain import MemoryReport, Relief
from serve.jobs.terms import WorkerReport
from serve.placements import Placement
from serve.rungs import Rung

AGED_S = 30.0
"""A job that has waited for so long goes before what a replica would rather take: every waiting has an end. Where it
waits for more memory than any card has, it is anybody's then."""
STARTING_S = 300.0
"""In which a placement without a living replica may get one: a node with a GPU comes in minutes."""
KEPT = 32
"""Measures that a job's record tells of; further ones are counted."""


@dataclass(slots=True)
class Cards:
    """What this replica has of its card, and the most that another placement or living replica of the same model has
    which draws images as large; 0 where it is not known. In units of 1e6 bytes.

    `planned` is the settings' word, `alive` the job store's; the worker hears it anew every few seconds.
    """

    own: int = 0
    planned: int = 0
    alive: int = 0

    @property
    def larger(self) -> bool:
        """Whether there is a card with more, be it that none of its replicas lives just now."""
        return 0 < self.own < max(self.planned, self.alive)

    @property
    def unmarked_after_s(self) -> float | None:
        """How long a job that ran out of as much memory must have waited before this replica tries it all the same:
        None (for ever) while a larger one lives, long where one is to come."""
        if self.alive > self.own:
            return None
        return STARTING_S if self.larger else AGED_S


def memory_mb(placement: Placement) -> int:
    return placement.memory_bytes // 10**6


def cards_of(placement: Placement, placements: Sequence[Placement]) -> Cards:
    """`placements` are those of the settings."""
    others = (each for each in placements if each.model == placement.model)
    planned = (memory_mb(each) for each in others if each.max_pixels >= placement.max_pixels)
    return Cards(own=memory_mb(placement), planned=max(planned, default=0))


def most_alive(placement: Placement, reports: Iterable[WorkerReport]) -> int:
    """`Cards.alive`, of what the workers of the placement's model have told."""
    return max((each.memory_mb for each in reports if each.max_pixels >= placement.max_pixels), default=0)


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
        return replace(self.report, rung=rung)

    def gives_back(self, cards: Cards) -> MemoryReport:
        """The attempt ends for lack of memory: the job is for a placement with more, where there is one."""
        self._told.append(Relief("job", "another_card" if cards.larger else "another_time"))
        report = self.report
        return replace(report, above_mb=max(cards.own, report.above_mb or 0)) if cards.larger else report

    @property
    def report(self) -> MemoryReport:
        before, told = self._before, tuple(self._told)
        return replace(before, retries=before.retries + len(told), relief=(before.relief + told)[:KEPT])
