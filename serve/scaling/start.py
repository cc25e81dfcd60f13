"""What a placement's cold start takes, as one of its replicas has seen it."""

from __future__ import annotations

import time
from collections.abc import Callable

from serve.jobs.terms import Crew, Start


class ColdStart:
    """From an order that finds nobody awake to its claim: a node's start, an image's pull, the replica's own start.

    The first job of a replica that comes up alone tells it, where that job is older than the replica's start. Others
    go by what was told before, and where nothing was, by their own start, which is less.

    Owns: what this replica has seen.
    """

    def __init__(self, placement: str, took_s: float) -> None:
        """`took_s` is this replica's own start, until it claims."""
        self._placement = placement
        self._took_s = took_s
        self._first_s: float | None = None

    def claimed(self, queued_s: float) -> None:
        """A job was claimed that had waited so long."""
        if self._first_s is None:
            self._first_s = queued_s

    def seconds(self, before: Crew) -> float:
        """`before` is the crew as it was when this replica came; once its first job is known, it stays with that."""
        alone = all(report.placement != self._placement for report in before.reports)
        if alone and self._first_s is not None and self._first_s > self._took_s:
            return self._first_s
        told = [report.start_s for report in (*before.reports, *before.asleep) if report.placement == self._placement]
        return max(told, default=0.0) or self._took_s


class Laps:
    """A replica's own start, phase by phase. `clock` tells Unix seconds.

    Owns: the phases so far.
    """

    def __init__(self, began_at: float, clock: Callable[[], float] = time.time) -> None:
        self._began_at = self._at = began_at
        self._clock = clock
        self._phases: dict[str, float] = {}

    def lap(self, name: str, at: float | None = None) -> None:
        """The phase of that name has ended, now or at some time before."""
        at = self._clock() if at is None else at
        self._phases[name] = round(max(0.0, at - self._at), 3)
        self._at = max(self._at, at)

    @property
    def start(self) -> Start:
        return Start(began_at=self._began_at, phases=dict(self._phases))
