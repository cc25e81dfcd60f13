"""A claimed job's sign of life, for as long as its worker is at it."""

from __future__ import annotations

import asyncio
import contextlib

from serve.domain import StepEvent
from serve.errors import LeaseLost, Unavailable
from serve.jobs.store import Claim, JobStore


class Pulse:
    """Tells the store of a claimed job's progress and renews its lease, one message at a time.

    Steps that are made while a message is under way are told together by the next one. `gone` is set when nobody waits
    for this run any more: the client cancelled the job, or its time is over, or another worker owns it. The pulse
    has stopped then.

    Owns: the task that beats.
    """

    def __init__(self, jobs: JobStore, claim: Claim, heartbeat_s: float) -> None:
        self._jobs = jobs
        self._claim = claim
        self._heartbeat_s = heartbeat_s
        self._loop = asyncio.get_running_loop()
        self._stepped = asyncio.Event()
        self._step = 0
        self.gone = asyncio.Event()
        self._task = asyncio.create_task(self._beat())

    def on_step(self, event: StepEvent) -> None:
        """Called on the engine's thread. Forward passes become the steps that the client asked for."""
        step = -(-event.step * self._claim.request.num_inference_steps // event.steps)
        self._loop.call_soon_threadsafe(self._note, step)

    async def stop(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def _note(self, step: int) -> None:
        self._step = step
        self._stepped.set()

    async def _beat(self) -> None:
        while not self.gone.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stepped.wait(), self._heartbeat_s)
            self._stepped.clear()
            try:
                wanted = await self._jobs.renew(self._claim, self._step)
            except LeaseLost:
                wanted = False
            except Unavailable:
                continue  # the run goes on; its result is committed when the store is back
            if not wanted:
                self.gone.set()
