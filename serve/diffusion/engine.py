"""The step loop of one replica: images join and leave between steps, and the VAE works beside it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

from serve.devices import be_nice
from serve.diffusion.forwards import Forwards
from serve.diffusion.ladder import Ladder, Shortage
from serve.diffusion.measurements import Measurement, Measurements
from serve.diffusion.profile import Profile
from serve.diffusion.run import OnPreview, OnRelief, OnStep, Picture, Rendered, Run, Work, public
from serve.diffusion.runner import Runner
from serve.diffusion.scheduler import LatentShape, Row, StepPlan, StepResult, StepScheduler
from serve.diffusion.state import Source
from serve.diffusion.vae_work import Command, VaeWork
from serve.errors import DeviceLost, GenerationFailed, OutOfMemory
from serve.rungs import MEANS, Rung, same_times
from serve.telemetry.metrics import Metrics

__all__ = ["Engine", "OnPreview", "OnRelief", "OnStep", "Rendered", "Work"]

log = logging.getLogger(__name__)


class Engine:
    """Submit work, get a future; steps are told as they are made on the loop's thread, previews on the VAE's.

    Images wait for the VAE as latents, a megabyte each at most, and whoever submits bounds the images in hand: so
    there is no bound here, and a slow VAE stops no step. A callback must not block. When one raises, its run fails
    (`on_step`) or goes without that preview, and the others never notice.

    Owns: the loop thread, the StepScheduler, the Runner and the VaeWork. Nothing else touches them: every call from
    outside, and every outcome of the VAE's thread, becomes a command that the loop runs between two steps. When the
    loop ends, whatever the reason, every future has its outcome; from then on commands run where they are given, and
    touch none of these.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: StepScheduler,
        profile: Profile,
        metrics: Metrics,
        niceness: int = 0,
        ladder: Ladder | None = None,
        on_cores: Callable[[], None] = lambda: None,
    ) -> None:
        """`niceness` is that of both threads: on a CPU, others want to be heard beside them. Where memory runs out, the
        runner is taken down the `ladder`; without one there is no way down. Where that leads from a card to the CPU,
        each of the two threads calls `on_cores`."""
        self._niceness = niceness
        self._on_cores = on_cores
        self._runner = runner
        self._scheduler = scheduler
        self._profile = profile
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._runs: dict[str, Run] = {}
        self._measurements = Measurements(runner)
        self._stopping = False
        self._ended = False
        self._broken = False
        self._working = False
        self._moved_at = time.monotonic()
        self._ladder = ladder or Ladder()
        self._shortage = Shortage(self._ladder, metrics, self._settle, self._relax)
        self._forwards = Forwards(runner, profile, metrics, self._shortage, self._runs.get, self._fail, self._busy)
        self._vae = VaeWork(
            runner, metrics, self._ladder, self._shortage, self._command, self._here, self._fail, self._lost, niceness
        )
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the loop and the VAE's thread are there to do what is submitted. No more, once a future has failed
        because they are not."""
        return not self._broken and not self._ended and self._thread.is_alive() and self._vae.alive

    @property
    def still_s(self) -> float:
        """Seconds in which nothing went on although there was something to do: since a step, a command or what the VAE
        had made was last done with, or since there was anything, or since what the VAE is at began. 0 with nothing in
        hand, or while weights are moved down the ladder. May be read on any thread."""
        since = max(self._moved_at, self.moving_until)
        waiting_s = time.monotonic() - since if self._in_hand else 0.0
        return max(waiting_s, self._vae.busy_s)

    @property
    def moving_until(self) -> float:
        """`Ladder.moving_until`. May be read on any thread."""
        return self._ladder.moving_until

    @property
    def rung(self) -> Rung:
        """Where the replica is on the memory ladder by now. May be read on any thread."""
        return self._ladder.rung

    @property
    def slowest_step_s(self) -> float:
        """Of the steps that the runs in hand make, as far as the profile knows. May be read on any thread."""
        lanes, widest, known = Counter[LatentShape](), Counter[LatentShape](), self._profile
        for run in list(self._runs.values()):
            for row in run.rows:
                shape = row.group.shape
                lanes[shape] += row.lanes
                widest[shape] = max(widest[shape], row.lanes)
        most = {shape: min(lanes[shape], max(known.lanes(shape), widest[shape])) for shape in lanes}
        return max((known.step_ms(shape, each) for shape, each in most.items()), default=0.0) / 1000

    def submit(
        self,
        work: Work,
        on_step: OnStep,
        on_preview: OnPreview | None = None,
        on_relief: OnRelief = lambda relief: None,
    ) -> Future[Rendered]:
        """Have the images join the next step; those that start from an image, once the VAE has encoded it. What is
        done about memory that runs out meanwhile is told to `on_relief`, on the loop's thread.

        The future fails with GenerationFailed, OutOfMemory or DeviceLost.
        """
        future: Future[Rendered] = Future()
        future.set_running_or_notify_cancel()  # who stops waiting can't cancel it: `cancel` is the way out
        began_at = time.monotonic()
        self._command(lambda: self._begin(work, on_step, on_preview, on_relief, future, began_at))
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

    def stop(self, within_s: float | None = None) -> None:
        """Finish the work that was submitted, then end both threads. Returns after `within_s` in any case: a thread
        that hangs is left to the end of the process."""
        self._command(self._stop)
        self._thread.join(within_s)
        if not self._broken:
            self._vae.join(within_s)

    @property
    def _in_hand(self) -> bool:
        return self._working or bool(self._runs) or bool(self._measurements) or not self._commands.empty()

    def _command(self, command: Command) -> None:
        if not self._in_hand:
            self._moved_at = time.monotonic()
        self._commands.put(command)
        if self._ended:
            self._run_commands()

    def _loop(self) -> None:
        be_nice(self._niceness)
        try:
            while self._admit():
                rows, step_ms = self._forwards.step(self._scheduler.plan().rows)
                self._account(rows, step_ms / 1000)
                self._publish(self._scheduler.commit(StepPlan(rows), step_ms))
                self._measure()
        except BaseException as error:  # whatever ends the loop, those who wait are told
            self._broken = True
            log.critical("the step loop ends: %s", error, exc_info=error)
        finally:
            self._end()

    def _end(self) -> None:
        """The outcomes come first. As long as `_ended` is not set, nobody else runs a command: only this thread is at
        the runs; and what may be broken, scheduler and runner, is left alone."""
        runs = list(self._runs.values())
        self._runs.clear()
        for run in runs:
            run.future.set_exception(DeviceLost("the device failed"))
        self._measurements.end(DeviceLost("the device failed"))
        self._ended = True
        self._vae.close()
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
        self._working = True
        try:
            yield
        finally:
            self._moved_at = time.monotonic()
            self._working = False

    def _begin(
        self,
        work: Work,
        on_step: OnStep,
        on_preview: OnPreview | None,
        on_relief: OnRelief,
        future: Future[Rendered],
        began_at: float,
    ) -> None:
        if self._ended:
            future.set_exception(DeviceLost("the step loop has ended"))
            return
        try:
            if work.run_id in self._runs:
                raise ValueError(f"run {work.run_id} is already here")
            rows = self._runner.rows(work)
        except Exception as error:  # noqa: BLE001  whatever is wrong with the work, the loop goes on for the others
            future.set_exception(public(error))
            return
        run = self._runs[work.run_id] = Run(work, rows, on_step, on_preview, on_relief, future, began_at)
        if work.image is None:
            self._join(run, None)
        else:
            self._vae.encode(run, self._join)

    def _join(self, run: Run, source: Source | None) -> None:
        if all(self._begun(run, row, source) for row in run.rows):
            run.joins()
            self._scheduler.add(run.rows)

    def _begun(self, run: Run, row: Row, source: Source | None) -> bool:
        """Whether the row has begun; else its run has failed."""
        started = time.monotonic()
        try:
            self._runner.begin(row, run.work, source)
        except DeviceLost:
            raise
        except OutOfMemory as error:
            self._shortage.count("begin")
            if self._shortage.make_room("begin", [run], started):
                return self._begun(run, row, source)
            self._fail(run.id, error)
        except Exception as error:  # noqa: BLE001  as above
            self._fail(run.id, error)
        return self._here(run)

    def _account(self, rows: Sequence[Row], took_s: float) -> None:
        """The step that was just made is part of these images' time. It counts for what failed in it too: whose run is
        gone has no time."""
        for row in rows:
            if run := self._runs.get(row.run_id):
                run.stepped(row.index, took_s, len(rows))
                run.approximate.update(self._runner.family.packed)

    def _publish(self, result: StepResult) -> None:
        for event in result.events:
            run = self._runs[event.run_id]
            try:
                run.on_step(event)
            except Exception as error:  # noqa: BLE001  who can't be told is no reason to stop the others
                self._fail(event.run_id, error)
            else:
                self._vae.preview(run, event)
        for row in result.finished:
            if run_of_row := self._runs.get(row.run_id):
                self._release(run_of_row, row)

    def _release(self, run: Run, row: Row) -> None:
        """The row has made its last step: its latents go to the VAE."""
        run.releases(row.index)
        try:
            run.approximate.update(self._runner.approximate(row))
            latents = self._runner.release(row)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001  this run fails, the loop goes on
            self._fail(run.id, error)
            return
        self._vae.decode(run, latents, partial(self._decoded, row.index))

    def _decoded(self, index: int, run: Run, image: Picture) -> None:
        run.images[index] = image
        if run.complete:
            del self._runs[run.id]
            run.future.set_result(run.rendered(self._ladder.rung))

    def _settle(self) -> float:
        """What works beside the loop ends what it is at: the ladder moves weights, and the step that is tried again
        wants that memory."""
        with self._busy():
            return self._vae.settle()

    def _relax(self, before: Rung) -> None:
        self._profile.relax(times=not same_times(before, self.rung))
        self._vae.relax()
        if MEANS[before].on_card and not MEANS[self.rung].on_card:
            self._on_cores()
            self._vae.on_thread(self._on_cores)

    def _here(self, run: Run) -> bool:
        return self._runs.get(run.id) is run

    def _lost(self, error: DeviceLost) -> None:
        if not self._ended:
            raise error

    def _fail(self, run_id: str, error: Exception) -> None:
        run = self._runs.pop(run_id, None)
        if run is None:
            return
        try:
            self._scheduler.remove(run_id)
            self._runner.drop(run.rows)
        finally:
            run.future.set_exception(public(error))

    def _begin_measurement(self, measurement: Measurement) -> None:
        if self._ended:
            measurement.future.set_exception(DeviceLost("the step loop has ended"))
        else:
            self._measurements.add(measurement)

    def _measure(self) -> None:
        if self._measurements:
            with self._busy():
                self._measurements.step()

    def _stop(self) -> None:
        self._stopping = True
