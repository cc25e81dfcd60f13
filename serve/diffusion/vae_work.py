"""What the VAE does for runs: beside the step loop, its outcome told to the loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from serve.diffusion.run import Picture, Run
from serve.diffusion.runner import Latents, Runner
from serve.diffusion.state import Source
from serve.diffusion.vae import TILE
from serve.diffusion.vae_thread import Task, VaeThread
from serve.domain import Preview, StepEvent
from serve.errors import DeviceLost, OutOfMemory
from serve.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")
Command = Callable[[], None]


class VaeWork:
    """Encoding, decoding and previews. All methods are the loop thread's, but for `alive` and `busy_s`.

    What the VAE's thread makes comes back as a command for the loop, which takes it only where the run is still here.
    On Apple's GPUs, which two threads can't share, there is no such thread: the loop does it between two steps.

    `command` has the loop run something between two steps; `here` says whether the loop still has the run, `fail` ends
    it; `lost` ends the loop, if it hasn't.

    Owns: the VaeThread.
    """

    def __init__(
        self,
        runner: Runner,
        metrics: Metrics,
        command: Callable[[Command], None],
        here: Callable[[Run], bool],
        fail: Callable[[str, Exception], None],
        lost: Callable[[DeviceLost], None],
        niceness: int = 0,
    ) -> None:
        self._runner = runner
        self._metrics = metrics
        self._command = command
        self._here = here
        self._fail = fail
        self._lost = lost
        self._thread = None if runner.family.device.type == "mps" else VaeThread(self._thread_ended, niceness)

    @property
    def alive(self) -> bool:
        return self._thread is None or self._thread.alive

    @property
    def busy_s(self) -> float:
        """Seconds since what the VAE's thread is at began, 0 while it waits."""
        return 0.0 if self._thread is None else self._thread.busy_s

    def close(self) -> None:
        """Begin nothing more. Returns at once."""
        if self._thread is not None:
            self._thread.close()

    def join(self, within_s: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(within_s)

    def encode(self, run: Run, then: Callable[[Run, Source | None], None]) -> None:
        """What the run starts from, for `then`."""

        def compute() -> Source | None:
            return self._runner.encode(run.work)

        self._aside(run, compute, compute, then)

    def decode(self, run: Run, latents: Latents, then: Callable[[Run, Picture], None]) -> None:
        """The finished image, for `then`. The second try takes smaller tiles than the VAE does by itself: an image that
        is larger than one of them comes out a little different, and is labelled."""
        request = run.work.request

        def in_tiles() -> Picture:
            picture = self._decoded(latents, tiled=True)
            if max(request.width, request.height) > TILE // 2:
                run.approximate.add("tiled_vae")
            return picture

        self._aside(run, lambda: self._decoded(latents), in_tiles, then)

    def preview(self, run: Run, event: StepEvent) -> None:
        """Make and tell a preview of each image that is still being drawn, if one is due."""
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
                self._command(partial(self._failed, run, error))
            except Exception as error:
                log.warning("a preview of run %s could not be given", run.id, exc_info=error)
            finally:
                run.previewing = False

        self._submit(make, preview=True)

    def _decoded(self, latents: Latents, *, tiled: bool = False) -> Picture:
        started, retries = time.monotonic(), self._runner.family.vae.retries
        try:
            return self._runner.decode(latents, tiled=True) if tiled else self._runner.decode(latents)
        finally:
            self._metrics.inc("tandem_vae_retries_total", self._runner.family.vae.retries - retries)
            self._metrics.observe("tandem_engine_decode_seconds", time.monotonic() - started)

    def _aside(
        self, run: Run, compute: Callable[[], T], again: Callable[[], T], then: Callable[[Run, T], None]
    ) -> None:
        """Have the VAE's thread compute something for the run; `then` takes the outcome on the loop's thread.

        Where that has no memory beside a step, `again` is computed between two, on the loop's thread: theirs is free
        then.
        """

        def task() -> None:
            if run.future.done():  # nobody waits for it any more
                return
            try:
                self._command(self._outcome(run, compute, then))
            except OutOfMemory as error:
                log.warning("%s beside a step; it is tried between two", error)
                self._metrics.inc("tandem_engine_out_of_memory_total")
                self._command(lambda: self._again(run, again, then))
            except Exception as error:  # noqa: BLE001  it is told where the run is owned
                self._command(partial(self._failed, run, error))

        self._submit(task)

    def _submit(self, task: Task, *, preview: bool = False) -> None:
        if self._thread is None:
            self._command(task)
        else:
            self._thread.submit(task, preview=preview)

    def _again(self, run: Run, again: Callable[[], T], then: Callable[[Run, T], None]) -> None:
        if not self._here(run):
            return
        try:
            command = self._outcome(run, again, then)
        except Exception as error:  # noqa: BLE001  as above
            self._failed(run, error)
        else:
            command()

    def _outcome(self, run: Run, compute: Callable[[], T], then: Callable[[Run, T], None]) -> Command:
        """Compute; what comes of it, as a command for the loop."""
        started = time.monotonic()
        value = compute()
        ended = time.monotonic()

        def command() -> None:
            if self._here(run):
                run.decodings.append((started, ended))
                then(run, value)

        return command

    def _failed(self, run: Run, error: Exception) -> None:
        if isinstance(error, DeviceLost):
            self._lost(error)
        elif self._here(run):
            self._fail(run.id, error)

    def _thread_ended(self, error: BaseException) -> None:
        """On the VAE's thread, its last words: without it no image is ever finished, so the loop ends too."""
        self._command(lambda: self._lost(DeviceLost("the VAE's thread has ended")))
