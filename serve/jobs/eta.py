"""When a job will have ended, predicted from what is before it, beside it and behind it. Plain Python.

The workers of a model are taken for one machine that gives each image in hand the same share of its time (processor
sharing: the step loop gives rows turns of equal time), and takes jobs from the queue in its order while it has rows.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from serve.jobs.terms import Crew

DEFAULT_ROWS = 8
"""Images in hand of a worker that has not reported."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is left of a job: milliseconds of a replica's time, for all its images; the least time that it takes."""

    cost_ms: float
    images: int
    alone_ms: float = 0.0


def eta_s(own: Load, standing: Sequence[Any], crew: Crew, start_s: float = 0.0) -> float:
    """Seconds until the job ends, of which `start_s` pass before anybody is awake who can draw it. `standing` is the
    answer of `standing()` in common.lua: the job's place (0 where a worker holds it), and flat lists of (milliseconds,
    images) of the jobs before it, after it, and held."""
    place, ahead, behind, held = standing
    workers = len(crew.reports) or 1
    rows = sum(report.max_rows for report in crew.reports) or DEFAULT_ROWS
    busy = list(_pairs(held))
    if place == 0:
        busy.insert(0, own)
        queue, watched = list(_pairs(behind)), 0
    else:
        before = list(_pairs(ahead))
        queue, watched = [*before, own, *_pairs(behind)], len(busy) + len(before)
    shared_ms = _shared_ms([*busy, *queue], watched, len(busy), workers, rows)
    return start_s + crew.pace * max(shared_ms, own.alone_ms) / 1000


def _shared_ms(loads: Sequence[Load], watched: int, held: int, workers: int, rows: int) -> float:
    """Milliseconds until job `watched` ends. The first `held` are in hand from the start; the others enter in order,
    whenever fewer than `rows` images are.

    In virtual time every image in hand gets a millisecond of work a millisecond, so that a job's end is known when it
    enters: a heap of ends is all that there is to keep (as in the proofs of generalized processor sharing, Parekh &
    Gallager 1993).
    """
    now = virtual = 0.0
    images, entered = 0, 0
    ends: list[tuple[float, int]] = []
    while True:
        while entered < len(loads) and (entered < held or images == 0 or images + loads[entered].images <= rows):
            each = max(1, loads[entered].images)
            heapq.heappush(ends, (virtual + loads[entered].cost_ms / each, entered))
            images += loads[entered].images
            entered += 1
        end, job = heapq.heappop(ends)
        # Fewer images than workers leave workers idle: an image has the time of one at most.
        now += (end - virtual) * max(1.0, images / workers)
        virtual = end
        if job == watched:
            return now
        images -= loads[job].images


def _pairs(flat: Sequence[Any]) -> Iterator[Load]:
    for cost, images in zip(flat[::2], flat[1::2], strict=True):
        yield Load(float(cost), int(images))
