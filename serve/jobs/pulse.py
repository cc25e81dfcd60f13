"""A claimed job's sign of life, for as long as its worker is at it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from serve.domain.jobs import JobState, Preview, StepEvent
from serve.errors import LeaseLost, TandemError, Unavailable
from serve.jobs.records import step_of
from serve.jobs.store import Claim, JobStore

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 1.0
TELL_EVERY_S = 0.1
"""Steps are told at beats of at least this length that all pulses of a process share, so that jobs travel together."""
STEPS_TOLD_A_SECOND = 50
"""Of all jobs that a process has in hand: with many of them the beats are longer. Each is a write to the disk of the
job store and a message to all who follow the job."""
SHOW_EVERY_S = 0.5
"""Between two messages with a job's previews."""


class Pulse:
    """Tells the store of a claimed job's progress and renews its lease, one message at a time; sends its previews.

    A state and the first step are told at once, further steps at the next beat. What comes while a message is under way
    is told by the next one. `gone` is set when nobody waits for this run any more: the client cancelled the job, of
    which the pulse hears at once, or its time is over, or another worker owns it. The pulse has stopped then.

    Previews go beside the signs of life, and not often: each is a write to the disk of the Redis that the leases of all
    jobs wait for. What has come of all images goes together, the image first that waits longest; one that still waits
    when the next of its image comes, or when the store is away, is dropped.

    Owns: the tasks that beat, that listen for a cancellation and that send previews.
    """

    def __init__(
        self, jobs: JobStore, claim: Claim, heartbeat_s: float, in_hand: Callable[[], int] = lambda: 1
    ) -> None:
        """`in_hand` says how many jobs this process tells of."""
        self._in_hand = in_hand
        self._jobs = jobs
        self._claim = claim
        self._heartbeat_s = heartbeat_s
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self._state = JobState.ENCODING
        self._step = 0
        self._beat_due: asyncio.TimerHandle | None = None
        self._previews: dict[int, Preview] = {}
        self.gone = asyncio.Event()
        self._task = asyncio.create_task(self._beat())
        self._listening = asyncio.create_task(self._listen())
        self._showing: asyncio.Task[None] | None = None

    def enter(self, state: JobState) -> None:
        """The job is at `running` or `storing` now."""
        self._state = state
        self._woken.set()

    def on_step(self, event: StepEvent) -> None:
        """Called on the engine's thread."""
        self._loop.call_soon_threadsafe(self._note, step_of(self._claim.request, event.step, event.steps))

    def on_preview(self, preview: Preview) -> None:
        """Called on the engine's thread."""
        self._loop.call_soon_threadsafe(self._show, preview)

    async def stop(self) -> None:
        tasks = [task for task in (self._task, self._listening, self._showing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._forget_beat()

    def _note(self, step: int) -> None:
        first, self._step = not self._step, step
        if first:
            self._woken.set()
        elif self._beat_due is None:
            now, beat_s = self._loop.time(), max(TELL_EVERY_S, self._in_hand() / STEPS_TOLD_A_SECOND)
            self._beat_due = self._loop.call_at(now - now % beat_s + beat_s, self._woken.set)

    def _forget_beat(self) -> None:
        if self._beat_due is not None:
            self._beat_due.cancel()
            self._beat_due = None

    def _show(self, preview: Preview) -> None:
        self._previews[preview.index] = preview  # an image that waits already keeps its place
        if self._showing is None or self._showing.done():
            self._showing = asyncio.create_task(self._send_previews())

    async def _listen(self) -> None:
        """Beside the renewals: a subscription that hangs must not cost the lease."""
        async with self._jobs.cancels(self._claim, self._woken):
            await self.gone.wait()

    async def _beat(self) -> None:
        while not self.gone.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_s):
                    await self._woken.wait()
            self._woken.clear()
            self._forget_beat()
            try:
                wanted = await self._jobs.renew(self._claim, self._step, self._state)
            except LeaseLost:
                wanted = False
            except Exception as error:  # the run goes on; its result is committed when the store is back
                if not isinstance(error, Unavailable):
                    log.exception("the lease of job %s could not be renewed", self._claim.job_id)
                await asyncio.sleep(min(self._heartbeat_s, _LOOK_AGAIN_S))
                self._woken.set()
                continue
            if not wanted:
                self.gone.set()

    async def _send_previews(self) -> None:
        while self._previews and not self.gone.is_set():
            waiting, self._previews = list(self._previews.values()), {}
            with contextlib.suppress(TandemError):  # without the claim or the store there is nobody to show them to
                await self._jobs.preview(self._claim, *waiting)
            await asyncio.sleep(SHOW_EVERY_S)
