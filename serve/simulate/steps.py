"""The server's step scheduler, many equal steps at once."""

from __future__ import annotations

from serve.diffusion.scheduler import FORGETTING, SHORTEST_MS, StepPlan, StepResult, StepScheduler


class SimulatedSteps(StepScheduler):
    """While every row takes part in every step, nothing is decided between two of them: `commit_many` counts such steps
    at once, and leaves what as many commits would (a test holds the two against each other)."""

    def made(self, run_id: str) -> int | None:
        """Steps that all images of a run have made; None where none of them steps."""
        return self._run_step(run_id) if run_id in self._runs else None

    def alike(self, plan: StepPlan) -> int:
        """How many steps can be made one after the other that are all this one: until a row has made its last."""
        if len(plan.rows) < len(self):
            return 1
        return min(row.steps - self._progress[row].done for row in plan.rows)

    def commit_many(self, plan: StepPlan, step_ms: float, times: int) -> StepResult:
        """As so many commits of the plan, at most `alike`. The events of the steps before the last are left out."""
        ahead = times - 1
        if ahead:
            cost_ms = max(step_ms, SHORTEST_MS)
            self._now_ms += ahead * cost_ms
            self._slowest_ms = max(cost_ms, FORGETTING**ahead * self._slowest_ms)
            self._lines[plan.rows[0].group].clock_ms += ahead * cost_ms / len(plan.rows)
            for row in plan.rows:
                self._progress[row].done += ahead
                self._progress[row].since_ms = self._now_ms
        return self.commit(plan, step_ms)
