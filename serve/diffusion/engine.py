"""The step loop of one replica: images join and leave between steps."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image

from serve.diffusion.runner import Runner
from serve.diffusion.scheduler import Row, StepPlan, StepResult, StepScheduler
from serve.domain import Conditioning, ImageRequest, StepEvent
from serve.errors import GenerationFailed, TandemError
from serve.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

OnStep = Callable[[StepEvent], None]


@dataclass(frozen=True, slots=True)
class Work:
    """A job that is ready to be drawn."""

    job_id: str
    request: ImageRequest
    conditioning: Conditioning


@dataclass(frozen=True, slots=True)
class Rendered:
    """The job's images in order; seconds from joining the loop to the last step, and seconds of decoding."""

    images: tuple[Image.Image, ...]
    denoise_s: float
    decode_s: float


@dataclass(slots=True)
class _Running:
    work: Work
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
    becomes a command that the loop runs between two steps.
    """

    def __init__(self, runner: Runner, scheduler: StepScheduler, metrics: Metrics) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._metrics = metrics
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._running: dict[str, _Running] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, work: Work, on_step: OnStep) -> Future[Rendered]:
        """Have the job's images join the next step. The future fails with GenerationFailed or OutOfMemory."""
        future: Future[Rendered] = Future()
        self._commands.put(lambda: self._begin(work, on_step, future))
        return future

    def cancel(self, job_id: str) -> None:
        """Take the job's images out before the next step; its future is cancelled. Unknown jobs are passed over."""
        self._commands.put(lambda: self._leave(job_id))

    def stop(self) -> None:
        """Finish the work that was submitted, then end the thread."""
        self._commands.put(self._stop)
        self._thread.join()

    def _loop(self) -> None:
        while self._admit():
            plan = self._scheduler.plan()
            if self._step(plan):
                self._publish(self._scheduler.commit(plan))

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

    def _begin(self, work: Work, on_step: OnStep, future: Future[Rendered]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        if work.job_id in self._running:
            future.set_exception(GenerationFailed("the job is being drawn already"))
            return
        rows = self._runner.rows(work.job_id, work.request)
        try:
            for row in rows:
                self._runner.begin(row, work.request, work.conditioning)
        except Exception as error:  # noqa: BLE001  whatever the job did wrong, the loop goes on for the others
            self._runner.drop(rows)
            future.set_exception(_public(error))
            return
        self._running[work.job_id] = _Running(work, on_step, future, time.monotonic())
        self._scheduler.add(rows)

    def _step(self, plan: StepPlan) -> bool:
        started = time.monotonic()
        try:
            self._runner.step(plan)
        except Exception as error:  # noqa: BLE001  the step's jobs fail, the loop goes on
            self._fail({row.job_id for row in plan.rows}, error)
            return False
        self._metrics.inc("tandem_engine_steps_total")
        self._metrics.observe("tandem_engine_step_rows", len(plan.rows))
        self._metrics.observe("tandem_engine_step_seconds", time.monotonic() - started)
        return True

    def _publish(self, result: StepResult) -> None:
        for event in result.events:
            self._running[event.job_id].on_step(event)
        for row in result.finished:
            self._finish(row)

    def _finish(self, row: Row) -> None:
        running = self._running.get(row.job_id)
        if running is None:  # an earlier image of the job failed to decode in this very step
            return
        started = time.monotonic()
        running.denoise_s = started - running.joined_at - running.decode_s
        try:
            running.images[row.index] = self._runner.finish(row)
        except Exception as error:  # noqa: BLE001  this job fails, the loop goes on
            self._fail({row.job_id}, error)
            return
        running.decode_s += time.monotonic() - started
        if len(running.images) == running.work.request.num_images:
            del self._running[row.job_id]
            images = tuple(running.images[index] for index in sorted(running.images))
            running.future.set_result(Rendered(images, running.denoise_s, running.decode_s))

    def _fail(self, job_ids: Iterable[str], error: Exception) -> None:
        log.error("jobs failed in the step loop", exc_info=error)
        for job_id in job_ids:
            running = self._running.pop(job_id)
            self._forget(job_id, running)
            running.future.set_exception(_public(error))

    def _leave(self, job_id: str) -> None:
        running = self._running.pop(job_id, None)
        if running is not None:
            self._forget(job_id, running)
            running.future.set_exception(GenerationFailed("the job was cancelled"))

    def _forget(self, job_id: str, running: _Running) -> None:
        self._scheduler.remove(job_id)
        self._runner.drop(self._runner.rows(job_id, running.work.request))

    def _stop(self) -> None:
        self._stopping = True


def _public(error: Exception) -> TandemError:
    return error if isinstance(error, TandemError) else GenerationFailed("the denoiser failed on this request")
