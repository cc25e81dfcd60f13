"""The step loop of one replica: images join and leave between steps."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image

from serve.diffusion.runner import Runner
from serve.diffusion.scheduler import Row, StepResult, StepScheduler
from serve.domain import Conditioning, ImageRequest, StepEvent
from serve.errors import DeviceLost, GenerationFailed, TandemError
from serve.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

OnStep = Callable[[StepEvent], None]


@dataclass(frozen=True, slots=True)
class Work:
    """A request that is ready to be drawn. `run_id` names this attempt: two attempts at one job are two runs."""

    run_id: str
    request: ImageRequest
    conditioning: Conditioning


@dataclass(frozen=True, slots=True)
class Rendered:
    """The images in order; seconds from joining the loop to the last step, and seconds of decoding."""

    images: tuple[Image.Image, ...]
    denoise_s: float
    decode_s: float


@dataclass(slots=True)
class _Run:
    rows: Sequence[Row]
    on_step: OnStep
    future: Future[Rendered]
    joined_at: float
    images: dict[int, Image.Image] = field(default_factory=dict)
    denoise_s: float = 0.0
    decode_s: float = 0.0


_Command = Callable[[], None]


class Engine:
    """Submit work, get a future; steps are told as they are made, on the loop's thread.

    Owns: the loop thread, the StepScheduler and the Runner. Nothing else touches them: every call from outside
    becomes a command that the loop runs between two steps. When the loop ends, whatever the reason, every future has
    its outcome.
    """

    def __init__(self, runner: Runner, scheduler: StepScheduler, metrics: Metrics) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._metrics = metrics
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._runs: dict[str, _Run] = {}
        self._stopping = False
        self._ended = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return not self._ended

    @property
    def busy_s(self) -> float:
        """Seconds since the step or decoding under way began; 0 between them."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def submit(self, work: Work, on_step: OnStep) -> Future[Rendered]:
        """Have the images join the next step. The future fails with GenerationFailed, OutOfMemory or DeviceLost."""
        future: Future[Rendered] = Future()
        future.set_running_or_notify_cancel()  # who stops waiting can't cancel it: `cancel` is the way out
        self._command(lambda: self._begin(work, on_step, future))
        return future

    def cancel(self, run_id: str) -> None:
        """Take the run's images out before the next step; its future fails. Unknown runs are passed over."""
        self._command(lambda: self._fail(run_id, GenerationFailed("the job was cancelled")))

    def stop(self) -> None:
        """Finish the work that was submitted, then end the thread."""
        self._command(self._stop)
        self._thread.join()

    def _command(self, command: _Command) -> None:
        self._commands.put(command)
        if self._ended:
            self._run_commands()

    def _loop(self) -> None:
        try:
            while self._admit():
                plan = self._scheduler.plan()
                self._step(plan.rows)
                self._publish(self._scheduler.commit(plan))
        except DeviceLost as error:
            log.critical("the step loop ends: %s", error, exc_info=error)
        except Exception:
            log.critical("the step loop ends", exc_info=True)
        finally:
            self._ended = True
            self._busy_since = None
            for run_id in list(self._runs):
                self._fail(run_id, DeviceLost("the device failed"))
            self._run_commands()

    def _admit(self) -> bool:
        """Run the waiting commands; sleep only when there is nothing to step. False when it is time to end."""
        while True:
            idle = not len(self._scheduler)
            if idle and self._stopping and self._commands.empty():
                return False
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            command()

    def _run_commands(self) -> None:
        """After the loop's end: what is still submitted fails at once."""
        while True:
            try:
                self._commands.get_nowait()()
            except queue.Empty:
                return

    def _begin(self, work: Work, on_step: OnStep, future: Future[Rendered]) -> None:
        if self._ended:
            future.set_exception(DeviceLost("the step loop has ended"))
            return
        rows = self._runner.rows(work.run_id, work.request)
        try:
            for row in rows:
                self._runner.begin(row, work.request, work.conditioning)
        except Exception as error:  # noqa: BLE001  whatever is wrong with the work, the loop goes on for the others
            self._runner.drop(rows)
            future.set_exception(_public(error))
            return
        self._runs[work.run_id] = _Run(rows, on_step, future, time.monotonic())
        self._scheduler.add(rows)

    def _step(self, rows: Sequence[Row]) -> None:
        """One step of all rows. A forward that fails is tried again by halves: whose fault it is fails alone."""
        started = self._busy_since = time.monotonic()
        try:
            failed = self._runner.step(rows)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001  whatever is wrong with the step, the loop goes on
            self._step_apart(rows, error)
            return
        finally:
            self._busy_since = None
        for row, reason in failed.items():
            self._fail(row.run_id, reason)
        self._metrics.inc("tandem_engine_steps_total")
        self._metrics.observe("tandem_engine_step_rows", len(rows))
        self._metrics.observe("tandem_engine_step_seconds", time.monotonic() - started)

    def _step_apart(self, rows: Sequence[Row], error: Exception) -> None:
        if len(rows) == 1:
            self._fail(rows[0].run_id, error)
            return
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            if left := [row for row in half if row.run_id in self._runs]:
                self._step(left)

    def _publish(self, result: StepResult) -> None:
        for event in result.events:
            self._runs[event.run_id].on_step(event)
        for row in result.finished:
            if row.run_id in self._runs:  # an earlier image of the run may have failed to decode just now
                self._finish(row)

    def _finish(self, row: Row) -> None:
        run = self._runs[row.run_id]
        started = self._busy_since = time.monotonic()
        run.denoise_s = started - run.joined_at - run.decode_s
        try:
            run.images[row.index] = self._runner.finish(row)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001  this run fails, the loop goes on
            self._fail(row.run_id, error)
            return
        finally:
            self._busy_since = None
        run.decode_s += time.monotonic() - started
        if len(run.images) == len(run.rows):
            del self._runs[row.run_id]
            images = tuple(run.images[index] for index in sorted(run.images))
            run.future.set_result(Rendered(images, run.denoise_s, run.decode_s))

    def _fail(self, run_id: str, error: Exception) -> None:
        run = self._runs.pop(run_id, None)
        if run is not None:
            self._scheduler.remove(run_id)
            self._runner.drop(run.rows)
            run.future.set_exception(_public(error))

    def _stop(self) -> None:
        self._stopping = True


def _public(error: Exception) -> TandemError:
    if isinstance(error, TandemError):
        return error
    log.error("a run failed in the step loop", exc_info=error)
    return GenerationFailed("the denoiser failed on this request")
