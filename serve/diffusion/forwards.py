"""The forward passes of a step, and what is learned of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from serve.diffusion.ladder import Shortage
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
        shortage: Shortage,
        run_of: Callable[[str], Run | None],
        fail: Callable[[str, Exception], None],
        busy: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._runner = runner
        self._profile = profile
        self._metrics = metrics
        self._shortage = shortage
        self._run_of = run_of
        self._fail = fail
        self._busy = busy
        self._made_s = 0.0

    def step(self, rows: Sequence[Row]) -> tuple[tuple[Row, ...], float]:
        """One step of these rows, or of the first of them where there was no memory for all: which, and the
        milliseconds of the forwards that made it. What was tried in vain, and the ways down the ladder, are nobody's
        steps: a size that met them would wait for its turn as long as they took. Rows whose runs failed in it are among
        them. Raises DeviceLost."""
        self._made_s = 0.0
        waiting = self._forward(rows) if rows else set()
        return tuple(row for row in rows if row not in waiting), self._made_s * 1000

    def _forward(self, rows: Sequence[Row]) -> set[Row]:
        """The rows that wait for the next step. A forward that fails is tried again by halves: whose fault it is fails
        alone. A row of more lanes than a step may have makes it in several passes."""
        started, reused = time.monotonic(), self._runner.reused_predictions
        most = self._profile.lanes(rows[0].group.shape)
        try:
            with self._busy():
                failed = self._runner.step(rows, most)
        except DeviceLost:
            raise
        except OutOfMemory as error:
            return self._smaller(rows, error, min(most, _lanes(rows)), started)
        except Exception as error:  # noqa: BLE001  whatever is wrong with the step, the loop goes on
            return self._apart(rows, error)
        for row, reason in failed.items():
            self._fail(row.run_id, reason)
        took_s = time.monotonic() - started
        self._made_s += took_s
        if not any(run.work.request.step_cache for row in rows if (run := self._run_of(row.run_id))):
            self._profile.learn(rows[0].group.shape, _lanes(rows), took_s * 1000)
        self._metrics.inc("tandem_engine_steps_total")
        self._metrics.inc("tandem_engine_image_steps_total", len(rows))
        self._metrics.observe("tandem_engine_step_rows", len(rows))
        self._metrics.observe("tandem_engine_step_seconds", took_s)
        if more := self._runner.reused_predictions - reused:
            self._metrics.inc("tandem_engine_reused_predictions_total", more)
        return set()

    def _apart(self, rows: Sequence[Row], error: Exception) -> set[Row]:
        if len(rows) == 1:
            self._fail(rows[0].run_id, error)
            return set()
        waiting: set[Row] = set()
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            if left := [row for row in half if self._run_of(row.run_id)]:
                waiting |= self._forward(left)
        return waiting

    def _smaller(self, rows: Sequence[Row], error: Exception, lanes: int, started: float) -> set[Row]:
        """No pass of what ran out of memory had more than `lanes`. From now on there are fewer: half of the rows make
        this step, and those that joined or stepped last wait for the next. A row that is alone makes it in passes of
        fewer lanes; where there is no memory for one lane, once more with nothing of the VAE's beside it, then on the
        next rung of the ladder; below the last, it fails."""
        shape, runs = rows[0].group.shape, [run for row in rows if (run := self._run_of(row.run_id))]
        self._shortage.count("step")
        if len(rows) > 1:
            self._profile.limit(shape, lanes)
            self._shortage.tell("step", "fewer_images", runs)
            first = rows[: (len(rows) + 1) // 2]
            return self._forward(first) | set(rows[len(first) :])
        if lanes > 1:
            self._profile.limit(shape, lanes)
            self._shortage.tell("step", "fewer_lanes", runs)
            return self._forward(rows)
        if self._shortage.make_room("step", runs, started):
            return self._forward(rows)
        self._fail(rows[0].run_id, error)
        return set()


def _lanes(rows: Sequence[Row]) -> int:
    return sum(row.lanes for row in rows)
