"""Which images step together. Plain Python: no torch, no threads, no clock."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from serve.domain import StepEvent

LatentShape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Row:
    """One image of one run of a job: the unit that joins and leaves the step batch.

    `steps` counts forward passes, which some samplers make more of than the client asked for steps. `shape` is the
    latent (height, width).
    """

    run_id: str
    index: int
    steps: int
    shape: LatentShape


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The rows of the next forward pass; all have the same latent shape, each is at a step of its own."""

    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a committed step brought about: progress of runs, and the rows that made their last step."""

    events: tuple[StepEvent, ...]
    finished: tuple[Row, ...]


class StepScheduler:
    """Round robin over latent shapes, and over the rows of a shape when they are more than a batch holds.

    A row waits at most (rows of its shape / max_rows) x (number of shapes) steps for its turn, whatever joins: rows
    that stepped go to the back of their shape's line, shapes that stepped go to the back of the shapes' line.

    Owns: each row's count of steps done.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._lines: OrderedDict[LatentShape, deque[Row]] = OrderedDict()
        self._done: dict[Row, int] = {}
        self._runs: dict[str, list[Row]] = {}

    def __len__(self) -> int:
        """Rows that still have steps to make."""
        return sum(len(line) for line in self._lines.values())

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if row in self._done:
                raise ValueError(f"{row} is already here")
            self._done[row] = 0
            self._runs.setdefault(row.run_id, []).append(row)
            self._lines.setdefault(row.shape, deque()).append(row)

    def plan(self) -> StepPlan:
        """The next batch; empty when there is nothing to step. Changes nothing until it is committed."""
        if not self._lines:
            return StepPlan(())
        line = next(iter(self._lines.values()))
        return StepPlan(tuple(islice(line, self._max_rows)))

    def commit(self, plan: StepPlan) -> StepResult:
        """Count the planned step as made. Rows that were cancelled since the plan are passed over."""
        rows = [row for row in plan.rows if row in self._done]
        if not rows:
            return StepResult((), ())
        before = {row.run_id: self._run_step(row.run_id) for row in rows}
        shape = rows[0].shape
        line = self._lines[shape]
        finished = []
        for row in rows:
            line.remove(row)
            self._done[row] += 1
            if self._done[row] < row.steps:
                line.append(row)
            else:
                finished.append(row)
        self._lines.move_to_end(shape)
        if not line:
            del self._lines[shape]
        steps = {row.run_id: row.steps for row in rows}
        events = [
            StepEvent(run_id, self._run_step(run_id), steps[run_id])
            for run_id, step in before.items()
            if self._run_step(run_id) > step
        ]
        for run_id in before:
            if all(self._done[row] == row.steps for row in self._runs[run_id]):
                self._forget(run_id)
        return StepResult(tuple(events), tuple(finished))

    def remove(self, run_id: str) -> None:
        """Take a run's rows out, finished ones too; nothing happens if it is not here."""
        for row in self._runs.get(run_id, ()):
            if self._done[row] < row.steps:
                self._lines[row.shape].remove(row)
                if not self._lines[row.shape]:
                    del self._lines[row.shape]
        self._forget(run_id)

    def check_integrity(self) -> None:
        """Raise AssertionError if the lines and the counts disagree."""
        waiting = [row for line in self._lines.values() for row in line]
        assert len(waiting) == len(set(waiting)), "a row stands in line twice"
        assert set(waiting) == {row for row, done in self._done.items() if done < row.steps}, "a row was lost"
        assert all(line and all(row.shape == shape for row in line) for shape, line in self._lines.items())
        assert {row for rows in self._runs.values() for row in rows} == set(self._done), "a run kept no count"

    def _run_step(self, run_id: str) -> int:
        return min(self._done[row] for row in self._runs[run_id])

    def _forget(self, run_id: str) -> None:
        for row in self._runs.pop(run_id, ()):
            del self._done[row]
