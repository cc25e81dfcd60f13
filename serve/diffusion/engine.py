"""The step loop of one replica: images join and leave between steps, and the VAE works beside it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from PIL import Image

from serve.diffusion.profile import Profile
from serve.diffusion.run import Measurement, OnPreview, OnStep, Rendered, Run, Work
from serve.diffusion.runner import Latents, Runner
from serve.diffusion.scheduler import LatentShape, Row, StepResult, StepScheduler
from serve.diffusion.state import Source
from serve.diffusion.vae_thread import VaeThread
from serve.domain import Preview, StepEvent
from serve.errors import DeviceLost, GenerationFailed, OutOfMemory, TandemError
from serve.telemetry.metrics import Metrics

__all__ = ["Engine", "OnPreview", "OnStep", "Rendered", "Work"]

log = logging.getLogger(__name__)

T = TypeVar("T")
_Command = Callable[[], None]


class Engine:
    """Submit work, get a future; steps are told as they are made on the loop's thread, previews on the VAE's.

    Images wait for the VAE as latents, a megabyte each at most, and whoever submits bounds the images in hand: so
    there is no bound here, and a slow VAE stops no step. A callback must not block. When one raises, its run fails
    (`on_step`) or goes without that preview, and the others never notice.

    Owns: the loop thread, the StepScheduler, the Runner and the VaeThread. Nothing else touches them: every call from
    outside, and every outcome of the VAE's thread, becomes a command that the loop runs between two steps. When the
    loop ends, whatever the reason, every future has its outcome.
    """

    def __init__(self, runner: Runner, scheduler: StepScheduler, profile: Profile, metrics: Metrics) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._profile = profile
        self._metrics = metrics
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._runs: dict[str, Run] = {}
        self._measurements: deque[Measurement] = deque()
        self._stopping = False
        self._ended = False
        self._broken = False
        self._busy_since: float | None = None
        self._vae = VaeThread()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return not self._ended

    @property
    def busy_s(self) -> float:
        """Seconds since what either thread is at began: a step, a decoding. 0 while both wait."""
        since = self._busy_since
        return max(0.0 if since is None else time.monotonic() - since, self._vae.busy_s)

    def submit(self, work: Work, on_step: OnStep, on_preview: OnPreview | None = None) -> Future[Rendered]:
        """Have the images join the next step; those that start from an image, once the VAE has encoded it.

        The future fails with GenerationFailed, OutOfMemory or DeviceLost.
        """
        future: Future[Rendered] = Future()
        future.set_running_or_notify_cancel()  # who stops waiting can't cancel it: `cancel` is the way out
        self._command(lambda: self._begin(work, on_step, on_preview, future))
        return future

    def cancel(self, run_id: str) -> None:
        """Take the run's images out before the next step, or away from the VAE; its future fails at once, and what the
        VAE is at for it is thrown away. Unknown runs are passed over."""
        self._command(lambda: self._fail(run_id, GenerationFailed("the job was cancelled")))

    def measure(self, shape: LatentShape, lanes: int, steps: int) -> Future[list[float]]:
        """Seconds of that many forward passes over made-up rows, each made between two steps of the users' work.

        The future fails with OutOfMemory, GenerationFailed or DeviceLost.
        """
        measurement = Measurement(shape, lanes, steps, Future())
        measurement.future.set_running_or_notify_cancel()
        self._command(lambda: self._begin_measurement(measurement))
        return measurement.future

    def stop(self) -> None:
        """Finish the work that was submitted, then end both threads."""
        self._command(self._stop)
        self._thread.join()
        if not self._broken:
            self._vae.join()

    def _command(self, command: _Command) -> None:
        self._commands.put(command)
        if self._ended:
            self._run_commands()

    def _loop(self) -> None:
        try:
            while self._admit():
                plan = self._scheduler.plan()
                step_ms = self._step(plan.rows)
                self._publish(self._scheduler.commit(plan, step_ms))
                self._measure()
        except Exception as error:
            self._broken = True
            log.critical("the step loop ends: %s", error, exc_info=error)
        finally:
            self._ended = True
            self._vae.close()
            for run_id in list(self._runs):
                self._fail(run_id, DeviceLost("the device failed"))
            for measurement in self._measurements:
                measurement.future.set_exception(DeviceLost("the device failed"))
            self._run_commands()

    def _admit(self) -> bool:
        """Run the waiting commands; sleep only when there is nothing to step. False when it is time to end."""
        while True:
            idle = not len(self._scheduler) and not self._measurements
            if idle and not self._runs and self._stopping and self._commands.empty():
                return False
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            with self._busy():
                command()

    def _run_commands(self) -> None:
        """After the loop's end: what is still submitted fails at once."""
        while True:
            try:
                self._commands.get_nowait()()
            except queue.Empty:
                return

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    def _begin(self, work: Work, on_step: OnStep, on_preview: OnPreview | None, future: Future[Rendered]) -> None:
        if self._ended:
            future.set_exception(DeviceLost("the step loop has ended"))
            return
        try:
            if work.run_id in self._runs:
                raise ValueError(f"run {work.run_id} is already here")
            rows = self._runner.rows(work)
        except Exception as error:  # noqa: BLE001  whatever is wrong with the work, the loop goes on for the others
            future.set_exception(_public(error))
            return
        run = self._runs[work.run_id] = Run(work, rows, on_step, on_preview, future)
        if work.image is None:
            self._join(run, None)
        else:
            self._aside(run, lambda: self._runner.encode(work), self._join)

    def _join(self, run: Run, source: Source | None) -> None:
        try:
            for row in run.rows:
                self._runner.begin(row, run.work, source)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001  as above
            self._fail(run.id, error)
            return
        run.joined_at = time.monotonic()
        self._scheduler.add(run.rows)

    def _step(self, rows: Sequence[Row]) -> float:
        """One step of all rows, in milliseconds: what it cost, forwards that failed and were tried again included."""
        started = time.monotonic()
        if rows:
            self._forward(rows)
        return (time.monotonic() - started) * 1000

    def _forward(self, rows: Sequence[Row]) -> None:
        """A forward that fails is tried again by halves: whose fault it is fails alone."""
        started, reused = time.monotonic(), self._runner.reused_predictions
        try:
            with self._busy():
                failed = self._runner.step(rows)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001  whatever is wrong with the step, the loop goes on
            self._forward_apart(rows, error)
            return
        for row, reason in failed.items():
            self._fail(row.run_id, reason)
        took_s = time.monotonic() - started
        if not any(run.work.request.step_cache for row in rows if (run := self._runs.get(row.run_id))):
            self._profile.learn(rows[0].group.shape, _lanes(rows), took_s * 1000)
        self._metrics.inc("tandem_engine_steps_total")
        self._metrics.observe("tandem_engine_step_rows", len(rows))
        self._metrics.observe("tandem_engine_step_seconds", took_s)
        if more := self._runner.reused_predictions - reused:
            self._metrics.inc("tandem_engine_reused_predictions_total", more)

    def _forward_apart(self, rows: Sequence[Row], error: Exception) -> None:
        if len(rows) == 1:
            self._fail(rows[0].run_id, error)
            return
        if isinstance(error, OutOfMemory):
            self._metrics.inc("tandem_engine_out_of_memory_total")
            self._profile.limit(rows[0].group.shape, _lanes(rows))
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            if left := [row for row in half if row.run_id in self._runs]:
                self._forward(left)

    def _publish(self, result: StepResult) -> None:
        for event in result.events:
            run = self._runs[event.run_id]
            try:
                run.on_step(event)
            except Exception as error:  # noqa: BLE001  who can't be told is no reason to stop the others
                self._fail(event.run_id, error)
            else:
                self._preview(run, event)
        for row in result.finished:
            if run_of_row := self._runs.get(row.run_id):
                self._release(run_of_row, row)

    def _release(self, run: Run, row: Row) -> None:
        """The row has made its last step: its latents go to the VAE."""
        run.released.add(row.index)
        run.denoise_s = time.monotonic() - run.joined_at
        try:
            run.approximate.update(self._runner.approximate(row))
            latents = self._runner.release(row)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001  this run fails, the loop goes on
            self._fail(run.id, error)
            return
        self._aside(run, lambda: self._decode(latents), partial(self._decoded, row.index))

    def _decode(self, latents: Latents) -> Image.Image:
        started, retries = time.monotonic(), self._runner.family.vae.retries
        try:
            return self._runner.decode(latents)
        finally:
            self._metrics.inc("tandem_vae_retries_total", self._runner.family.vae.retries - retries)
            self._metrics.observe("tandem_engine_decode_seconds", time.monotonic() - started)

    def _decoded(self, index: int, run: Run, image: Image.Image) -> None:
        run.images[index] = image
        if run.complete:
            del self._runs[run.id]
            run.future.set_result(run.rendered())

    def _preview(self, run: Run, event: StepEvent) -> None:
        """Have the VAE's thread make and tell a preview of each image that is still being drawn."""
        if not run.wants_preview(event):
            return
        latents = {row.index: self._runner.peek(row) for row in run.rows if row.index not in run.released}
        run.previewing = True

        def make() -> None:
            try:
                for index, each in latents.items():
                    if run.on_preview is not None and not run.future.done():
                        data = self._runner.preview(each)
                        run.on_preview(Preview(run.id, index, event.step, event.steps, data))
                        self._metrics.inc("tandem_engine_previews_total")
            except DeviceLost as error:
                self._command(partial(self._failed_aside, run, error))
            except Exception as error:
                log.warning("a preview of run %s could not be given", run.id, exc_info=error)
            finally:
                run.previewing = False

        self._vae.submit(make, preview=True)

    def _aside(self, run: Run, compute: Callable[[], T], then: Callable[[Run, T], None]) -> None:
        """Have the VAE's thread compute something for the run; `then` takes the outcome on the loop's thread.

        What has no memory beside a step is computed once more between two, on the loop's thread: theirs is free then.
        """

        def task() -> None:
            if run.future.done():  # nobody waits for it any more
                return
            try:
                self._command(self._outcome(run, compute, then))
            except OutOfMemory as error:
                log.warning("%s beside a step; it is tried between two", error)
                self._metrics.inc("tandem_engine_out_of_memory_total")
                self._command(lambda: self._again(run, compute, then))
            except Exception as error:  # noqa: BLE001  it is told where the run is owned
                self._command(partial(self._failed_aside, run, error))

        self._vae.submit(task)

    def _again(self, run: Run, compute: Callable[[], T], then: Callable[[Run, T], None]) -> None:
        if self._runs.get(run.id) is not run:
            return
        try:
            command = self._outcome(run, compute, then)
        except Exception as error:  # noqa: BLE001  as above
            self._failed_aside(run, error)
        else:
            command()

    def _outcome(self, run: Run, compute: Callable[[], T], then: Callable[[Run, T], None]) -> _Command:
        """Compute; what comes of it, as a command for the loop."""
        started = time.monotonic()
        value = compute()
        took_s = time.monotonic() - started

        def command() -> None:
            if self._runs.get(run.id) is run:
                run.decode_s += took_s
                then(run, value)

        return command

    def _failed_aside(self, run: Run, error: Exception) -> None:
        if isinstance(error, DeviceLost) and not self._ended:
            raise error
        if self._runs.get(run.id) is run:
            self._fail(run.id, error)

    def _fail(self, run_id: str, error: Exception) -> None:
        run = self._runs.pop(run_id, None)
        if run is not None:
            self._scheduler.remove(run_id)
            self._runner.drop(run.rows)
            run.future.set_exception(_public(error))

    def _begin_measurement(self, measurement: Measurement) -> None:
        if self._ended:
            measurement.future.set_exception(DeviceLost("the step loop has ended"))
        else:
            self._measurements.append(measurement)

    def _measure(self) -> None:
        """One forward of the measurement under way, if there is one."""
        if not self._measurements:
            return
        measurement = self._measurements[0]
        try:
            with self._busy():
                measurement.seconds.append(self._runner.measure(measurement.shape, measurement.lanes))
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001  a measurement that fails is told, the loop goes on
            self._measurements.popleft().future.set_exception(_public(error))
            return
        if len(measurement.seconds) >= measurement.steps:
            self._measurements.popleft().future.set_result(measurement.seconds)

    def _stop(self) -> None:
        self._stopping = True


def _lanes(rows: Sequence[Row]) -> int:
    return sum(row.lanes for row in rows)


def _public(error: Exception) -> TandemError:
    if isinstance(error, TandemError):
        return error
    log.error("a run failed in the step loop", exc_info=error)
    return GenerationFailed("the denoiser failed on this request")
