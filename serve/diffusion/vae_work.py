"""What the VAE does for runs: beside the step loop, its outcome told to the loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from serve.diffusion.ladder import Ladder, Shortage
from serve.diffusion.paste import pasted
from serve.diffusion.run import Picture, Run
from serve.diffusion.runner import Latents, Runner
from serve.diffusion.state import Source
from serve.diffusion.vae_thread import Task, VaeThread
from serve.diffusion.vae_ways import Way, Ways
from serve.domain.jobs import Preview, StepEvent
from serve.errors import DeviceLost, OutOfMemory
from serve.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")
Command = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Piece(Generic[T]):
    """What the VAE is to compute for a run, in tiles of the side that `compute` is given (None: the VAE's own). `then`
    takes the outcome, on the loop's thread."""

    run: Run
    ways: Ways
    compute: Callable[[int | None], T]
    then: Callable[[Run, T], None]


class VaeWork:
    """Encoding, decoding and previews. All methods are the loop thread's, but for `alive` and `busy_s`.

    What the VAE's thread makes comes back as a command for the loop, which takes it only where the run is still here.
    On Apple's GPUs, which two threads can't share, there is no such thread: the loop does it between two steps. So it
    does on the rungs of the memory ladder that ask for it.

    `command` has the loop run something between two steps; `here` says whether the loop still has the run, `fail` ends
    it; `lost` ends the loop, if it hasn't.

    Owns: the VaeThread, what is known of the sizes that ran out of memory, and how often that was forgotten.
    """

    def __init__(
        self,
        runner: Runner,
        metrics: Metrics,
        ladder: Ladder,
        shortage: Shortage,
        command: Callable[[Command], None],
        here: Callable[[Run], bool],
        fail: Callable[[str, Exception], None],
        lost: Callable[[DeviceLost], None],
        niceness: int = 0,
    ) -> None:
        self._runner = runner
        self._metrics = metrics
        self._ladder = ladder
        self._shortage = shortage
        self._encoding, self._decoding = Ways("encode"), Ways("decode")
        self._command = command
        self._here = here
        self._fail = fail
        self._lost = lost
        self._relaxed = 0
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

    def settle(self) -> float:
        """Return once the thread has done all that it was given, so that nothing of it is in the memory, and who calls
        is alone with the VAE. When the last of it ended (`time.monotonic`), 0 where there never was any."""
        return 0.0 if self._thread is None else self._thread.settle()

    def relax(self) -> None:
        """There is other memory than before: what ran out of it may be tried as it was first."""
        self._relaxed += 1
        self._encoding.relax()
        self._decoding.relax()

    def on_thread(self, task: Task) -> None:
        """Run something on the thread, once it has done what it was given."""
        if self._thread is not None:
            self._thread.submit(task)

    def encode(self, run: Run, then: Callable[[Run, Source | None], None]) -> None:
        """What the run starts from, for `then`."""
        self._begin(_Piece(run, self._encoding, lambda side: self._runner.encode(run.work, side), then))

    def decode(self, run: Run, latents: Latents, then: Callable[[Run, Picture], None]) -> None:
        """The finished image, for `then`."""
        self._begin(_Piece(run, self._decoding, lambda side: pasted(self._decoded(latents, side), run.work), then))

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

    def _decoded(self, latents: Latents, side: int | None) -> Picture:
        started, retries = time.monotonic(), self._runner.family.vae.retries
        try:
            return self._runner.decode(latents, side)
        finally:
            self._metrics.inc("tandem_vae_retries_total", self._runner.family.vae.retries - retries)
            self._metrics.observe("tandem_engine_decode_seconds", time.monotonic() - started)

    def _begin(self, piece: _Piece[T]) -> None:
        """Have the VAE compute something for a run. What runs out of memory is tried in the next of its ways."""
        means, request = self._ladder.means, piece.run.work.request
        beside = self._thread is not None and means.decode == "beside"
        left = piece.ways.of(request, self._runner.family.vae.tile, beside=beside)
        if left[0].beside:
            self._submit(partial(self._aside, piece, left))
        else:
            self._command(partial(self._between, piece, left))

    def _aside(self, piece: _Piece[T], left: Sequence[Way]) -> None:
        """On the VAE's thread."""
        if piece.run.future.done():  # nobody waits for it any more
            return
        try:
            self._command(self._outcome(piece, left[0]))
        except OutOfMemory as error:
            self._shortage.count(piece.ways.phase)
            self._command(partial(self._ran_out, piece, left, error, self._relaxed))
        except Exception as error:  # noqa: BLE001  it is told where the run is owned
            self._command(partial(self._failed, piece.run, error))

    def _between(self, piece: _Piece[T], left: Sequence[Way]) -> None:
        """On the loop's thread: the memory of the steps is free now."""
        if not self._here(piece.run):
            return
        started = time.monotonic()
        try:
            command = self._outcome(piece, left[0])
        except OutOfMemory as error:
            self._shortage.count(piece.ways.phase)
            self._next(piece, left, error, started)
        except Exception as error:  # noqa: BLE001  as above
            self._failed(piece.run, error)
        else:
            command()

    def _ran_out(self, piece: _Piece[T], left: Sequence[Way], error: OutOfMemory, relaxed: int) -> None:
        """It ran out of memory on the thread, when so much had been forgotten: what a rung before had no memory for
        says nothing of this one, and is begun anew."""
        if relaxed == self._relaxed:
            self._next(piece, left, error, time.monotonic())
        elif self._here(piece.run):
            self._begin(piece)

    def _next(self, piece: _Piece[T], left: Sequence[Way], error: OutOfMemory, started: float) -> None:
        """It ran out of memory in the first of the ways that are left, which was begun at `started`."""
        run, phase = piece.run, piece.ways.phase
        if not self._here(run):
            return
        piece.ways.ran_out(left[0], run.work.request)
        if len(left) > 1:
            left = left[1:]
            self._shortage.tell(phase, left[0].name, [run])
        elif not self._shortage.make_room(phase, [run], started):
            self._failed(run, error)
            return
        self._between(piece, left)

    def _submit(self, task: Task, *, preview: bool = False) -> None:
        if self._thread is None or self._ladder.means.decode == "between":
            self._command(task)
        else:
            self._thread.submit(task, preview=preview)

    def _outcome(self, piece: _Piece[T], way: Way) -> Command:
        """Compute; what comes of it, as a command for the loop."""
        run, request = piece.run, piece.run.work.request
        seams = self._runner.family.vae.differs(request.height, request.width, side=way.side)
        started = time.monotonic()
        value = piece.compute(way.side)
        ended = time.monotonic()

        def command() -> None:
            if self._here(run):
                run.decodings.append((started, ended))
                if seams:
                    run.approximate.add("tiled_vae")
                piece.then(run, value)

        return command

    def _failed(self, run: Run, error: Exception) -> None:
        if isinstance(error, DeviceLost):
            self._lost(error)
        elif self._here(run):
            self._fail(run.id, error)

    def _thread_ended(self, error: BaseException) -> None:
        """On the VAE's thread, its last words: without it no image is ever finished, so the loop ends too."""
        self._command(lambda: self._lost(DeviceLost("the VAE's thread has ended")))
