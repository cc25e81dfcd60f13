"""Which images step together. Plain Python: no torch, no threads, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from serve.domain.jobs import StepEvent

LatentShape = tuple[int, int]

SHORTEST_MS = 1e-3
"""A step costs at least this, so that the clocks below move whatever was measured."""
FORGETTING = 0.9
"""What a step leaves of the slowest before it: one that compiled, or the machine slept through, is soon forgotten."""


@dataclass(frozen=True, slots=True)
class Group:
    """What rows must have in common to share a forward pass.

    `shape` is the latent (height, width). `context` counts the text's tokens where the family can't pad them, else it
    is 0. `adapters` name what is patched into the denoiser.
    """

    shape: LatentShape
    context: int = 0
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One image of one run of a job: the unit that joins and leaves the step batch.

    `steps` counts forward passes, which some samplers make more of than the client asked for steps. `lanes` are the
    entries of the batch that it takes: 2 with classifier-free guidance, else 1.
    """

    run_id: str
    index: int
    steps: int
    group: Group
    lanes: int = 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The rows of the next forward pass; all are of one group, each is at a step of its own."""

    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a committed step brought about: progress of runs, and the rows that made their last step."""

    events: tuple[StepEvent, ...]
    finished: tuple[Row, ...]


class Caps(Protocol):
    """What bounds a step: `Profile` in the server."""

    max_batch_size: int
    """Most rows of a step."""

    def lanes(self, shape: LatentShape) -> int:
        """Most lanes of a step for that latent shape."""


@dataclass(slots=True)
class _Line:
    """A group's rows, the one that has waited longest in front. `clock_ms` is the time that each of them has had."""

    clock_ms: float = 0.0
    rows: deque[Row] = field(default_factory=deque)


@dataclass(slots=True)
class _Progress:
    """Steps done, and the time on the scheduler's clock at which the row last stepped or joined."""

    since_ms: float
    done: int = 0


class StepScheduler:
    """Deficit round robin with ageing over groups, round robin over the rows of a group.

    The cost of a step is its measured time, and its rows share it: the group's clock goes on by `step_ms / rows`, and
    the group whose clock is furthest behind steps next. This is deficit round robin whose quantum is so small that a
    round ends as soon as somebody may step, with a weight of as many rows as the group can step at once; kept as clocks
    it is start-time fair queueing (Goyal, Vin & Cheng 1996), which never needs a step's cost before it was made. So
    rows get equal time, not groups: of two groups that have rows throughout, neither's clock gets ahead of the other's
    by more than one of its own steps (but for ageing). A group that comes starts at the clock of the one furthest
    behind, so that it claims no time from before it was there; one that empties is remembered until the others have
    caught up with it.

    Ageing bounds the wait that this may cost a lone row among full batches: a row that has waited `patience_ms` (of
    step time) goes before every deficit, the longest wait first. Patience is `max_wait_ms`, or where steps are slow
    twice the time in which the rows here could step one by one, by the slowest recent step: more than equal time makes
    a lone row wait among steps as slow as its own, for else it would be ageing that says whose turn it is. Each step
    beyond it takes a row that has waited as long or longer, and none of these comes back in front of it. So a row waits
    at most the longest patience meanwhile, and one step for each row that was there when its wait began, itself
    counted; what joins meanwhile counts for the patience alone.

    `caps` bounds the lanes of a step, and its rows; a row always fits alone.

    Owns: each row's count of steps done.
    """

    def __init__(self, caps: Caps, max_wait_ms: float = 1000.0) -> None:
        self._caps = caps
        self._max_wait_ms = max_wait_ms
        self._slowest_ms = 0.0
        self._now_ms = 0.0
        self._lines: dict[Group, _Line] = {}
        self._progress: dict[Row, _Progress] = {}
        self._runs: dict[str, list[Row]] = {}

    def __len__(self) -> int:
        """Rows that still have steps to make."""
        return sum(len(line.rows) for line in self._lines.values())

    @property
    def patience_ms(self) -> float:
        """The wait beyond which a row goes before every other."""
        return max(self._max_wait_ms, 2 * len(self) * self._slowest_ms)

    def add(self, rows: Iterable[Row]) -> None:
        """Have the rows join behind those of their groups. ValueError for one that is here."""
        for row in rows:
            if row in self._progress:
                raise ValueError(f"{row} is already here")
            line = self._lines.setdefault(row.group, _Line())
            if not line.rows:
                line.clock_ms = max(line.clock_ms, self._floor_ms())
            line.rows.append(row)
            self._progress[row] = _Progress(self._now_ms)
            self._runs.setdefault(row.run_id, []).append(row)

    def plan(self) -> StepPlan:
        """The next batch; empty when there is nothing to step. Changes nothing until it is committed."""
        line = self._next()
        if line is None:
            return StepPlan(())
        left = self._caps.lanes(line.rows[0].group.shape)
        taken: list[Row] = []
        for row in line.rows:
            if len(taken) == self._caps.max_batch_size:
                break
            if not taken or row.lanes <= left:  # a row that doesn't fit keeps its place, and is in front in the end
                taken.append(row)
                left -= row.lanes
        return StepPlan(tuple(taken))

    def commit(self, plan: StepPlan, step_ms: float) -> StepResult:
        """Count the planned step as made, in that time. Rows that were cancelled since the plan are passed over."""
        if not plan.rows:
            return StepResult((), ())
        cost_ms = step_ms if step_ms > SHORTEST_MS else SHORTEST_MS
        self._now_ms += cost_ms
        self._slowest_ms = max(cost_ms, FORGETTING * self._slowest_ms)
        if line := self._lines.get(plan.rows[0].group):
            line.clock_ms += cost_ms / len(plan.rows)
        rows = [row for row in plan.rows if row in self._progress]
        before = {row.run_id: self._run_step(row.run_id) for row in rows}
        finished = [row for row in rows if self._advance(row)]
        steps = {row.run_id: row.steps for row in rows}
        after = {run_id: self._run_step(run_id) for run_id in before}
        events = [
            StepEvent(run_id, after[run_id], steps[run_id]) for run_id in before if after[run_id] > before[run_id]
        ]
        for run_id in before:
            if all(self._progress[row].done == row.steps for row in self._runs[run_id]):
                self._forget(run_id)
        self._settle()
        return StepResult(tuple(events), tuple(finished))

    def remove(self, run_id: str) -> None:
        """Take a run's rows out, finished ones too; nothing happens if it is not here."""
        for row in self._runs.get(run_id, ()):
            if self._progress[row].done < row.steps:
                self._lines[row.group].rows.remove(row)
        self._forget(run_id)
        self._settle()

    def check_integrity(self) -> None:
        """Raise AssertionError if the lines, the counts and the clocks disagree."""
        waiting = [row for line in self._lines.values() for row in line.rows]
        assert len(waiting) == len(set(waiting)), "a row stands in line twice"
        unfinished = {row for row, progress in self._progress.items() if progress.done < row.steps}
        assert set(waiting) == unfinished, "a row was lost"
        assert {row for rows in self._runs.values() for row in rows} == set(self._progress), "a run kept no count"
        for group, line in self._lines.items():
            assert all(row.group == group for row in line.rows), "a row stands in another group's line"
            since = [self._progress[row].since_ms for row in line.rows]
            assert since == sorted(since), "a row stands before one that has waited longer"
            assert line.rows or line.clock_ms > self._floor_ms(), "a group is remembered for nothing"

    def _next(self) -> _Line | None:
        """The line of the next step: the longest wait beyond the bound, else the clock furthest behind."""
        lines = [line for line in self._lines.values() if line.rows]
        if not lines:
            return None
        oldest = min(lines, key=self._waiting_since)
        if self._now_ms - self._waiting_since(oldest) >= self.patience_ms:
            return oldest
        return min(lines, key=lambda line: (line.clock_ms, self._waiting_since(line)))

    def _waiting_since(self, line: _Line) -> float:
        return self._progress[line.rows[0]].since_ms

    def _advance(self, row: Row) -> bool:
        """Count one step and send the row to the back of its line; whether it was its last."""
        line = self._lines[row.group].rows
        line.remove(row)
        progress = self._progress[row]
        progress.done += 1
        progress.since_ms = self._now_ms
        if progress.done < row.steps:
            line.append(row)
        return progress.done == row.steps

    def _floor_ms(self) -> float:
        """The clock furthest behind among groups with rows. It never goes back while there are any."""
        return min((line.clock_ms for line in self._lines.values() if line.rows), default=0.0)

    def _settle(self) -> None:
        """Forget empty groups that the others have caught up with, and everything when nobody is left."""
        if not any(line.rows for line in self._lines.values()):
            self._lines.clear()
            self._now_ms = self._slowest_ms = 0.0
            return
        floor_ms = self._floor_ms()
        for group in [group for group, line in self._lines.items() if not line.rows and line.clock_ms <= floor_ms]:
            del self._lines[group]

    def _run_step(self, run_id: str) -> int:
        return min(self._progress[row].done for row in self._runs[run_id])

    def _forget(self, run_id: str) -> None:
        for row in self._runs.pop(run_id, ()):
            del self._progress[row]
