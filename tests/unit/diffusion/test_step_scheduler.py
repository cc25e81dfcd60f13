"""The StepScheduler against a plain model: every row makes its steps, nobody starves, cancels leave no trace."""

from collections import Counter
from math import ceil

import hypothesis.strategies as st
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.diffusion.scheduler import Row, StepScheduler

SHAPES = [(16, 16), (16, 24), (32, 32)]
jobs = st.tuples(st.integers(1, 4), st.integers(1, 6), st.sampled_from(SHAPES))


def rows_of(run_id: str, images: int, steps: int, shape: tuple[int, int]) -> list[Row]:
    return [Row(run_id, index, steps, shape) for index in range(images)]


@given(st.lists(jobs, min_size=1, max_size=12), st.integers(1, 5))
def test_every_row_makes_exactly_its_steps(orders: list[tuple[int, int, tuple[int, int]]], max_rows: int) -> None:
    scheduler = StepScheduler(max_rows)
    wanted = Counter()
    for number, (images, steps, shape) in enumerate(orders):
        rows = rows_of(str(number), images, steps, shape)
        scheduler.add(rows)
        wanted.update(dict.fromkeys(rows, steps))
    made: Counter[Row] = Counter()
    told: Counter[str] = Counter()
    while plan := scheduler.plan().rows:
        assert len(plan) <= max_rows
        assert len({row.shape for row in plan}) == 1
        result = scheduler.commit(scheduler.plan())
        made.update(plan)
        assert all(made[row] == row.steps for row in result.finished)
        told.update(event.run_id for event in result.events)
        scheduler.check_integrity()
    assert made == wanted
    assert told == {str(number): steps for number, (_, steps, _) in enumerate(orders)}
    assert len(scheduler) == 0


@given(st.lists(jobs, min_size=1, max_size=12), st.integers(1, 5))
def test_no_row_waits_longer_than_a_round(orders: list[tuple[int, int, tuple[int, int]]], max_rows: int) -> None:
    scheduler = StepScheduler(max_rows)
    everyone = [row for n, (images, steps, shape) in enumerate(orders) for row in rows_of(str(n), images, steps, shape)]
    scheduler.add(everyone)
    waited = dict.fromkeys(everyone, 0)
    bound = {
        shape: ceil(sum(row.shape == shape for row in everyone) / max_rows) * len({row.shape for row in everyone})
        for shape in SHAPES
    }
    while plan := scheduler.plan().rows:
        result = scheduler.commit(scheduler.plan())
        for row in plan:
            waited[row] = 0
        for row in result.finished:
            del waited[row]
        for row in waited.keys() - set(plan):
            waited[row] += 1
            assert waited[row] < bound[row.shape]


class Comings(RuleBasedStateMachine):
    """Jobs come, step and are cancelled in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = StepScheduler(3)
        self.left: dict[Row, int] = {}
        self.number = 0

    @rule(job=jobs)
    def add(self, job: tuple[int, int, tuple[int, int]]) -> None:
        rows = rows_of(str(self.number), *job)
        self.number += 1
        self.scheduler.add(rows)
        self.left |= {row: row.steps for row in rows}

    @rule()
    def step(self) -> None:
        plan = self.scheduler.plan()
        assert bool(plan.rows) == bool(self.left)
        result = self.scheduler.commit(plan)
        for row in plan.rows:
            self.left[row] -= 1
        assert set(result.finished) == {row for row in plan.rows if self.left[row] == 0}
        for row in result.finished:
            del self.left[row]

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        run_id = data.draw(st.sampled_from(sorted({row.run_id for row in self.left})))
        self.scheduler.remove(run_id)
        self.left = {row: steps for row, steps in self.left.items() if row.run_id != run_id}

    @rule()
    def cancel_between_plan_and_commit(self) -> None:
        plan = self.scheduler.plan()
        for run_id in {row.run_id for row in plan.rows}:
            self.scheduler.remove(run_id)
            self.left = {row: steps for row, steps in self.left.items() if row.run_id != run_id}
        assert self.scheduler.commit(plan).finished == ()

    @invariant()
    def whole(self) -> None:
        self.scheduler.check_integrity()
        assert len(self.scheduler) == len(self.left)


TestComings = Comings.TestCase
