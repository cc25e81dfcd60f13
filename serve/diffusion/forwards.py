"""The forward passes of a step, and what is learned of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from serve.diffusion.profile import Profile
from serve.diffusion.run import Run
from serve.diffusion.runner import Runner
from serve.diffusion.scheduler import Row
from serve.errors import DeviceLost, OutOfMemory
from serve.telemetry.metrics import Metrics


class Forwards:
    """All methods are the loop thread's. `run_of` finds the runs that are still here, `fail` ends one, `busy` is held
    during each forward."""

    def __init__(
        self,
        runner: Runner,
        profile: Profile,
        metrics: Metrics,
        run_of: Callable[[str], Run | None],
        fail: Callable[[str, Exception], None],
        busy: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._runner = runner
        self._profile = profile
        self._metrics = metrics
        self._run_of = run_of
        self._fail = fail
        self._busy = busy

    def step(self, rows: Sequence[Row]) -> float:
        """One step of all rows, in milliseconds: what it cost, forwards that failed and were tried again included.
        Raises DeviceLost."""
        started = time.monotonic()
        if rows:
            self._forward(rows)
        return (time.monotonic() - started) * 1000

    def _forward(self, rows: Sequence[Row]) -> None:
        """A forward that fails is tried again by halves: whose fault it is fails alone. A row of more lanes than a step
        may have makes it in several passes."""
        started, reused = time.monotonic(), self._runner.reused_predictions
        most = self._profile.lanes(rows[0].group.shape)
        try:
            with self._busy():
                failed = self._runner.step(rows, most)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001  whatever is wrong with the step, the loop goes on
            self._apart(rows, error, min(most, _lanes(rows)))
            return
        for row, reason in failed.items():
            self._fail(row.run_id, reason)
        took_s = time.monotonic() - started
        if not any(run.work.request.step_cache for row in rows if (run := self._run_of(row.run_id))):
            self._profile.learn(rows[0].group.shape, _lanes(rows), took_s * 1000)
        self._metrics.inc("tandem_engine_steps_total")
        self._metrics.inc("tandem_engine_image_steps_total", len(rows))
        self._metrics.observe("tandem_engine_step_rows", len(rows))
        self._metrics.observe("tandem_engine_step_seconds", took_s)
        if more := self._runner.reused_predictions - reused:
            self._metrics.inc("tandem_engine_reused_predictions_total", more)

    def _apart(self, rows: Sequence[Row], error: Exception, lanes: int) -> None:
        """No pass of what failed had more than `lanes`. Without memory for them there are fewer from now on; a row that
        has none for one lane at a time fails."""
        divisible = isinstance(error, OutOfMemory) and lanes > 1
        if isinstance(error, OutOfMemory):
            self._metrics.inc("tandem_engine_out_of_memory_total")
        if divisible:
            self._profile.limit(rows[0].group.shape, lanes)
        if len(rows) > 1:
            for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
                if left := [row for row in half if self._run_of(row.run_id)]:
                    self._forward(left)
        elif divisible:
            self._forward(rows)
        else:
            self._fail(rows[0].run_id, error)


def _lanes(rows: Sequence[Row]) -> int:
    return sum(row.lanes for row in rows)
