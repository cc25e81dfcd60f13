"""Who waits for whom: equal time for rows, a bounded wait for each, short jobs before long ones."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import given

from serve.diffusion.scheduler import Group, Row, StepPlan, StepScheduler

GROUPS = [Group((16, 16)), Group((24, 24)), Group((32, 32)), Group((16, 16), context=154)]
Cost = Callable[[StepPlan], float]


@dataclass
class Caps:
    most: Mapping[tuple[int, int], int] = field(default_factory=dict)
    max_batch_size: int = 8

    def lanes(self, shape: tuple[int, int]) -> int:
        return self.most.get(shape, 16)


def images(run_id: str, steps: int, group: Group = GROUPS[0], count: int = 1) -> list[Row]:
    return [Row(run_id, index, steps, group, 2) for index in range(count)]


def constant(ms: float) -> Cost:
    return lambda plan: ms


def by_row(ms: float) -> Cost:
    """No gain from batching."""
    return lambda plan: ms * len(plan.rows)


joins = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 3), st.integers(1, 12), st.sampled_from(GROUPS), st.integers(1, 2)),
    min_size=1,
    max_size=14,
)


@given(joins=joins, caps=st.integers(1, 8), max_wait_ms=st.sampled_from([0.0, 20.0, 150.0]), data=st.data())
def test_no_row_waits_longer_than_the_bound(
    joins: list[tuple[int, int, int, Group, int]], caps: int, max_wait_ms: float, data: st.DataObject
) -> None:
    """The longest patience meanwhile, and one step for each row that was there when the wait began, itself counted;
    steps of any length, whoever joins meanwhile."""
    longest_ms = 40.0
    scheduler = StepScheduler(Caps(defaultdict(lambda: caps)), max_wait_ms)
    waited: dict[Row, float] = {}
    ahead: dict[Row, int] = {}
    patience: dict[Row, float] = defaultdict(float)
    most = 0
    for turn in range(10**6):
        for number, (when, count, steps, group, lanes) in enumerate(joins):
            if when == turn:
                rows = [Row(str(number), index, steps, group, lanes) for index in range(count)]
                scheduler.add(rows)
                waited |= dict.fromkeys(rows, 0.0)
                ahead |= dict.fromkeys(rows, len(waited))
        most = max(most, len(scheduler))
        plan = scheduler.plan()
        if not plan.rows and turn > 30:
            break
        cost_ms = data.draw(st.sampled_from([0.5, 7.0, longest_ms]))
        for row in waited:
            patience[row] = max(patience[row], scheduler.patience_ms)
        for row in plan.rows:
            assert waited[row] <= patience[row] + ahead[row] * longest_ms
            assert patience[row] <= max(max_wait_ms, 2 * most * longest_ms)
        result = scheduler.commit(plan, cost_ms)
        for row in result.finished:
            del waited[row]
        for row in waited:
            waited[row] = 0.0 if row in plan.rows else waited[row] + cost_ms
            ahead[row] = len(waited) if row in plan.rows else ahead[row]
            patience[row] = 0.0 if row in plan.rows else patience[row]
    assert not waited


@given(
    counts=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    costs=st.lists(st.floats(1.0, 50.0), min_size=4, max_size=4),
    turns=st.integers(1, 200),
)
def test_rows_of_different_groups_get_equal_time(counts: list[int], costs: list[float], turns: int) -> None:
    """Each row of a step pays an equal share of its time. But for ageing, what the rows of one group have paid is never
    further from what those of another have than one step of either."""
    scheduler = StepScheduler(Caps(), max_wait_ms=float("inf"))
    for number, count in enumerate(counts):
        scheduler.add(images(str(number), 1000, GROUPS[number], count))
    cost = dict(zip(GROUPS, costs, strict=True))
    had: dict[Group, float] = dict.fromkeys(GROUPS[: len(counts)], 0.0)
    share = {group: cost[group] / min(8, count) for group, count in zip(GROUPS, counts, strict=False)}
    for _ in range(turns):
        plan = scheduler.plan()
        scheduler.commit(plan, cost[plan.rows[0].group])
        had[plan.rows[0].group] += cost[plan.rows[0].group] / len(plan.rows)
        for one in had:
            for other in had:
                assert had[one] - had[other] <= max(share[one], share[other]) + 1e-6


def test_a_group_that_comes_and_goes_gains_nothing() -> None:
    """Jobs of one step, one after the other, get the time of one row, as one long job would."""
    scheduler = StepScheduler(Caps(), max_wait_ms=float("inf"))
    scheduler.add(images("long", 10**6, GROUPS[0], 8))
    here, short = False, 0
    for turn in range(900):
        if not here:
            scheduler.add(images(f"short{turn}", 1, GROUPS[1]))
        plan = scheduler.plan()
        here = plan.rows[0].group == GROUPS[0]
        short += not here
        scheduler.commit(plan, 8.0)
    assert short == pytest.approx(100, abs=2)


def test_a_group_that_comes_late_claims_no_time_from_before() -> None:
    scheduler = StepScheduler(Caps())
    scheduler.add(images("early", 1000))
    for _ in range(100):
        scheduler.commit(scheduler.plan(), 5.0)
    scheduler.add(images("late", 1000, GROUPS[1]))
    first = []
    for _ in range(10):
        plan = scheduler.plan()
        first.append(plan.rows[0].run_id)
        scheduler.commit(plan, 5.0)
    assert first.count("late") == 5


@pytest.mark.parametrize("step_ms", [30.0, 300.0, 600.0, 1000.0, 5000.0])
def test_a_slow_device_is_as_fair_as_a_fast_one(step_ms: float) -> None:
    """Eight images step eight times for each step of another size's one: ageing doesn't take over."""
    scheduler = StepScheduler(Caps())
    scheduler.add(images("many", 10**6, GROUPS[0], 8))
    scheduler.add(images("lone", 10**6, GROUPS[1]))
    lone = 0
    for _ in range(900):
        plan = scheduler.plan()
        lone += plan.rows[0].run_id == "lone"
        scheduler.commit(plan, step_ms)
    assert lone == pytest.approx(100, abs=2)


def test_one_step_that_took_minutes_makes_nobody_wait_for_long() -> None:
    """Its compilation is paid by the lone row's clock; ageing has it step again long before that is made up."""
    scheduler = StepScheduler(Caps())
    scheduler.add(images("many", 10**6, GROUPS[0], 8))
    scheduler.add(images("lone", 10**6, GROUPS[1]))
    turns = [0]
    for turn in range(300):
        plan = scheduler.plan()
        lone = plan.rows[0].run_id == "lone"
        scheduler.commit(plan, 120_000.0 if lone and len(turns) == 1 else 100.0)
        turns += [turn] * lone
    assert turns[2] - turns[1] <= 80, "by its share it would wait for 9600 steps"


def test_a_lone_slow_row_among_quick_full_batches_steps_about_once_in_max_wait() -> None:
    """By its share it would step once in eight seconds."""
    scheduler = StepScheduler(Caps(), max_wait_ms=1000.0)
    scheduler.add(images("many", 10**6, GROUPS[0], 8))
    scheduler.add(images("lone", 10**6, GROUPS[1]))
    steps = 0
    for _ in range(1000):
        plan = scheduler.plan()
        lone = plan.rows[0].run_id == "lone"
        steps += lone
        scheduler.commit(plan, 990.0 if lone else 50.0)
    assert 1000 / 28 <= steps <= 1000 / 20


def finish(scheduler: StepScheduler, cost: Cost, joining: Sequence[Row] = (), after: int = 0) -> dict[str, float]:
    """Step until nobody is left; when each run ended. `joining` come after that many steps."""
    now_ms, ended, steps = 0.0, {}, 0
    while True:
        if steps == after and joining:
            scheduler.add(joining)
        plan = scheduler.plan()
        if not plan.rows:
            return ended
        cost_ms = cost(plan)
        now_ms += cost_ms
        steps += 1
        ended |= {row.run_id: now_ms for row in scheduler.commit(plan, cost_ms).finished}


@given(
    group=st.sampled_from(GROUPS[:2]),
    cap=st.sampled_from([2, 8, 16, 32]),
    cost=st.sampled_from([constant(10.0), by_row(10.0), constant(400.0)]),
    after=st.integers(0, 15),
)
def test_a_4_step_job_behind_eight_50_step_jobs_finishes_first(group: Group, cap: int, cost: Cost, after: int) -> None:
    """And slows none of them by more than its own four steps, in the same group as in another."""

    def eight() -> StepScheduler:
        scheduler = StepScheduler(Caps(defaultdict(lambda: cap)))
        for number in range(8):
            scheduler.add(images(f"long{number}", 50))
        return scheduler

    short = images("short", 4, group)
    without, with_short = finish(eight(), cost), finish(eight(), cost, short, after)
    assert min(with_short, key=lambda run_id: with_short[run_id]) == "short"
    own_ms = 4 * cost(StepPlan(tuple(images("", 1, group, cap // 2 if group == GROUPS[0] else 1))[:8]))
    for run_id, ended_ms in without.items():
        assert with_short[run_id] <= ended_ms + own_ms
