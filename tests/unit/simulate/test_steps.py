"""Many equal steps at once are as many commits."""

import random

from serve.diffusion.scheduler import Group, Row, StepScheduler
from serve.simulate.steps import SimulatedSteps


class Caps:
    max_batch_size = 4

    def lanes(self, shape: tuple[int, int]) -> int:
        return 8


def test_rows_end_at_the_same_time_and_in_the_same_order_as_step_by_step() -> None:
    rng = random.Random(1)
    for _ in range(30):
        one, many = StepScheduler(Caps()), SimulatedSteps(Caps())
        joining = sorted((rng.randrange(60), number) for number in range(rng.randrange(1, 12)))
        rows = {number: _row(rng, number) for _, number in joining}
        assert _run(one, joining, rows) == _run(many, joining, rows)


def _row(rng: random.Random, number: int) -> Row:
    group = Group(rng.choice(((64, 64), (64, 64), (96, 64))))
    return Row(f"r{number}", 0, rng.randrange(1, 30), group, rng.choice((1, 2)))


def _run(scheduler: StepScheduler, joining: list[tuple[int, int]], rows: dict[int, Row]) -> list[tuple[float, str]]:
    """When each row ended. Who comes while steps are under way joins after the one under way."""
    now, left, ended = 0, list(joining), []
    while left or len(scheduler):
        while left and left[0][0] <= now:
            scheduler.add([rows[left.pop(0)[1]]])
        plan = scheduler.plan()
        if not plan.rows:
            now = left[0][0]
            continue
        ms = len(plan.rows)
        times = 1
        if isinstance(scheduler, SimulatedSteps):
            times = scheduler.alike(plan)
            if left:
                times = max(1, min(times, -(-(left[0][0] - now) // ms)))
            result = scheduler.commit_many(plan, ms, times)
        else:
            result = scheduler.commit(plan, ms)
        scheduler.check_integrity()
        now += ms * times
        ended += [(now, row.run_id) for row in result.finished]
    return ended
