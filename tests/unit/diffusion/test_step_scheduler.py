"""The StepScheduler against a plain model: every row makes its steps, batches fit, cancels leave no trace."""

from collections import Counter
from dataclasses import dataclass

import hypothesis.strategies as st
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.diffusion.scheduler import Group, Row, StepPlan, StepScheduler

GROUPS = [Group((16, 16)), Group((16, 24)), Group((16, 16), context=77), Group((16, 16), adapters=("a", "b"))]
Order = tuple[int, int, Group, int]
orders = st.tuples(st.integers(1, 4), st.integers(1, 6), st.sampled_from(GROUPS), st.integers(1, 5))


@dataclass
class Caps:
    most: int
    max_batch_size: int = 8

    def lanes(self, shape: tuple[int, int]) -> int:
        return self.most if shape == (16, 16) else self.most + 1


caps = st.builds(Caps, st.integers(1, 7), st.integers(1, 5))


def rows_of(run_id: str, images: int, steps: int, group: Group, lanes: int) -> list[Row]:
    return [Row(run_id, index, steps, group, lanes) for index in range(images)]


def check_fits(plan: StepPlan, caps: Caps) -> None:
    assert len({row.group for row in plan.rows}) == 1
    assert len(plan.rows) <= caps.max_batch_size
    most = caps.lanes(plan.rows[0].group.shape)
    assert sum(row.lanes for row in plan.rows) <= most or len(plan.rows) == 1


@given(st.lists(orders, min_size=1, max_size=12), caps)
def test_every_row_makes_exactly_its_steps(wanted: list[Order], caps: Caps) -> None:
    scheduler = StepScheduler(caps)
    left: Counter[Row] = Counter()
    for number, (images, steps, group, lanes) in enumerate(wanted):
        rows = rows_of(str(number), images, steps, group, lanes)
        scheduler.add(rows)
        left.update(dict.fromkeys(rows, steps))
    told: Counter[str] = Counter()
    while (plan := scheduler.plan()).rows:
        check_fits(plan, caps)
        result = scheduler.commit(plan, 10.0)
        left.subtract(plan.rows)
        assert all(left[row] == 0 for row in result.finished)
        told.update(event.run_id for event in result.events)
        scheduler.check_integrity()
    assert not any(left.values())
    assert told == {str(number): steps for number, (_, steps, _, _) in enumerate(wanted)}
    assert len(scheduler) == 0


@given(st.lists(orders, min_size=1, max_size=12), caps)
def test_a_batch_is_never_smaller_than_it_need_be(wanted: list[Order], caps: Caps) -> None:
    scheduler = StepScheduler(caps)
    waiting = [row for number, order in enumerate(wanted) for row in rows_of(str(number), *order)]
    scheduler.add(waiting)
    plan = scheduler.plan()
    left = caps.lanes(plan.rows[0].group.shape) - sum(row.lanes for row in plan.rows)
    outside = [row for row in waiting if row.group == plan.rows[0].group and row not in plan.rows]
    assert len(plan.rows) == caps.max_batch_size or all(row.lanes > left for row in outside)


def test_planning_changes_nothing() -> None:
    scheduler = StepScheduler(Caps(4))
    scheduler.add([row for group in GROUPS for row in rows_of(str(group), 2, 3, group, 2)])
    assert scheduler.plan() == scheduler.plan()


def test_a_cap_that_falls_holds_from_the_next_step() -> None:
    caps = Caps(6)
    scheduler = StepScheduler(caps)
    scheduler.add(rows_of("one", 3, 5, GROUPS[0], 2))
    plan = scheduler.plan()
    assert len(plan.rows) == 3
    caps.most = 3
    scheduler.commit(plan, 1.0)
    assert len(scheduler.plan().rows) == 1


class Comings(RuleBasedStateMachine):
    """Jobs come, step and are cancelled in any order, while caps change."""

    def __init__(self) -> None:
        super().__init__()
        self.caps = Caps(3)
        self.scheduler = StepScheduler(self.caps, max_wait_ms=50.0)
        self.left: dict[Row, int] = {}
        self.number = 0

    @rule(order=orders)
    def add(self, order: Order) -> None:
        rows = rows_of(str(self.number), *order)
        self.number += 1
        self.scheduler.add(rows)
        self.left |= {row: row.steps for row in rows}

    @rule(caps=caps)
    def limit(self, caps: Caps) -> None:
        self.caps.most, self.caps.max_batch_size = caps.most, caps.max_batch_size

    @rule(step_ms=st.sampled_from([0.0, 1.0, 30.0, 2000.0, float("nan")]))
    def step(self, step_ms: float) -> None:
        plan = self.scheduler.plan()
        assert bool(plan.rows) == bool(self.left)
        result = self.scheduler.commit(plan, step_ms)
        for row in plan.rows:
            self.left[row] -= 1
        assert set(result.finished) == {row for row in plan.rows if self.left[row] == 0}
        for row in result.finished:
            del self.left[row]

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.forget(data.draw(st.sampled_from(sorted({row.run_id for row in self.left}))))

    @rule(data=st.data())
    def cancel_between_plan_and_commit(self, data: st.DataObject) -> None:
        plan = self.scheduler.plan()
        for run_id in {row.run_id for row in plan.rows}:
            self.forget(run_id)
        assert self.scheduler.commit(plan, 5.0).finished == ()

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def one_of_a_plan_is_cancelled(self, data: st.DataObject) -> None:
        plan = self.scheduler.plan()
        self.forget(data.draw(st.sampled_from(plan.rows)).run_id)
        result = self.scheduler.commit(plan, 5.0)
        for row in set(plan.rows) & set(self.left):
            self.left[row] -= 1
            assert (self.left[row] == 0) == (row in result.finished)
        self.left = {row: steps for row, steps in self.left.items() if steps}

    def forget(self, run_id: str) -> None:
        self.scheduler.remove(run_id)
        self.left = {row: steps for row, steps in self.left.items() if row.run_id != run_id}

    @invariant()
    def whole(self) -> None:
        self.scheduler.check_integrity()
        assert len(self.scheduler) == len(self.left)


TestComings = Comings.TestCase
