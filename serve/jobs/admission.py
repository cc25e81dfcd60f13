"""What a full queue is told as: why, and when there will be room."""

from __future__ import annotations

from serve.errors import QueueFull
from serve.jobs.terms import Crew
from serve.settings.stores import JobSettings

_SHORTEST_S, _LONGEST_S = 1.0, 120.0
_ROOM = 0.1
"""Share of the queue that should have drained before those who were refused come back."""


def queue_full(waiting_ms: float, over_ms: float, crew: Crew, settings: JobSettings) -> QueueFull:
    """`waiting_ms` of work wait for the model, `over_ms` are too many; 0 where the number of jobs is what is too much.

    What is too much must have drained, at the pace of the workers, and some room for the others who are told the same.
    """
    drain_s = crew.pace * max(over_ms, _ROOM * waiting_ms) / max(1, len(crew.reports)) / 1000
    if over_ms:
        told = f"{waiting_ms / 1000:.0f} s of work are waiting for this model"
    else:
        told = f"{settings.max_queued} jobs are waiting already"
    return QueueFull(told, retry_after_s=min(max(drain_s, _SHORTEST_S), _LONGEST_S))
