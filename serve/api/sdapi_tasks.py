"""What a caller of the A1111 dialect has under way: how far it is, and its end before the time."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from serve.api.sdapi_schemas import Progress, State, TaskProgress
from serve.callers import Caller
from serve.domain.jobs import Job, JobState
from serve.errors import JobNotFound
from serve.jobs.calls import Call, Part
from serve.service import ImageService

_PAUSE_S = 10.0
"""Longest between a call's beginning, or the end of its jobs, and the jobs that follow."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A call and its jobs as they are now."""

    call: Call
    parts: tuple[tuple[Part, Job], ...]

    @property
    def over(self) -> bool:
        """Nothing of it is under way. Before the first job, and between two passes, something is although no job is;
        but not for long, unless who was to answer it has died."""
        if self.call.ended or self.current is not None:
            return self.call.ended
        if self.parts and self.call.stages == 1:
            return True
        latest = max([self.call.started_at, *(job.finished_at or 0.0 for _, job in self.parts)])
        return time.time() - latest > _PAUSE_S

    @property
    def current(self) -> tuple[Part, Job] | None:
        """The first job that has not ended."""
        return next(((part, job) for part, job in self.parts if not job.state.terminal), None)

    @property
    def progress(self) -> float:
        """0 to 1."""
        return min(1.0, sum(part.share * _done(job) for part, job in self.parts))

    @property
    def eta_s(self) -> float:
        """As predicted for the jobs; while some are still to come, by what the others took."""
        told = [job.eta_s for _, job in self.parts if job.eta_s is not None and not job.state.terminal]
        if told and sum(part.share for part, _ in self.parts) > 0.999:
            return max(told)
        done = self.progress
        return (time.time() - self.call.started_at) * (1 - done) / done if done else max(told, default=0.0)

    @property
    def passes_done(self) -> int:
        """A1111 counts a pass of a round as one, however many pictures it has."""
        passes: dict[tuple[int, int], bool] = {}
        for part, job in self.parts:
            place = part.round, part.stage
            passes[place] = passes.get(place, True) and job.state.terminal
        return sum(passes.values())


async def newest(service: ImageService, caller: Caller) -> Seen | None:
    """The caller's newest call that is under way."""
    for call in await service.calls.calls(caller.owner):
        seen = await _seen(service, caller, call)
        if not seen.over:
            return seen
    return None


async def progress(service: ImageService, caller: Caller, *, image: bool) -> Progress:
    """Of the newest; `image`: with a preview where there is one. Raises BackendUnavailable."""
    seen = await newest(service, caller)
    if seen is None:
        return Progress(progress=0.0, eta_relative=0.0, state=State())
    call, current = seen.call, seen.current
    shown = await _preview(service, seen) if image else None
    state = State(
        skipped=bool(call.stopped),
        interrupted=call.interrupted,
        job=call.id,
        job_count=call.rounds * call.stages,
        job_timestamp=time.strftime("%Y%m%d%H%M%S", time.gmtime(call.started_at)),
        job_no=seen.passes_done,
        sampling_step=current[1].step if current else 0,
        sampling_steps=current[1].steps if current else 0,
    )
    return Progress(
        progress=seen.progress,
        eta_relative=seen.eta_s,
        state=state,
        current_image=shown and base64.b64encode(shown[1]).decode(),
        textinfo=_waiting(seen),
        current_task=call.id,
    )


async def progress_of(service: ImageService, caller: Caller, call_id: str, *, after: int, image: bool) -> TaskProgress:
    """Of one call; `after`: with a preview only where it is later than that one. Raises BackendUnavailable."""
    call = await service.calls.call(caller.owner, call_id)
    if call is None:
        return TaskProgress(active=False, queued=False, completed=False, textinfo="Waiting...")
    seen = await _seen(service, caller, call)
    if seen.over:
        return TaskProgress(active=False, queued=False, completed=True, progress=1.0, eta=0.0)
    queued = all(job.state is JobState.QUEUED for _, job in seen.parts)
    shown = await _preview(service, seen) if image else None
    if shown is not None and shown[0] <= after:
        shown = None
    return TaskProgress(
        active=not queued,
        queued=queued,
        completed=False,
        progress=seen.progress,
        eta=seen.eta_s,
        live_preview=shown and f"data:image/jpeg;base64,{base64.b64encode(shown[1]).decode()}",
        id_live_preview=shown[0] if shown else after,
        textinfo=_waiting(seen),
    )


async def interrupt(service: ImageService, caller: Caller) -> None:
    """End all that the caller has under way: each call answers with what it has by then. Raises BackendUnavailable."""
    for call in await service.calls.calls(caller.owner):
        await _stop(service, caller, call, None)


async def skip(service: ImageService, caller: Caller) -> None:
    """End the round that the newest call is at. Raises BackendUnavailable."""
    seen = await newest(service, caller)
    if seen is not None and seen.current is not None:
        await _stop(service, caller, seen.call, seen.current[0].round)


async def _stop(service: ImageService, caller: Caller, call: Call, round_: int | None) -> None:
    """First it is said, then what is there is cancelled: what comes in between is told when it comes."""
    told = await service.calls.stop_call(caller.owner, call.id, round_)
    for part in told.parts if told else ():
        if round_ in (None, part.round):
            with contextlib.suppress(JobNotFound):
                await service.cancel(part.job_id, caller)


async def _seen(service: ImageService, caller: Caller, call: Call) -> Seen:
    """Jobs whose record is gone are left out."""

    async def known(part: Part) -> tuple[Part, Job] | None:
        with contextlib.suppress(JobNotFound):
            return part, await service.get(part.job_id, caller)
        return None

    found = await asyncio.gather(*map(known, call.parts))
    return Seen(call, tuple(each for each in found if each is not None))


async def _preview(service: ImageService, seen: Seen) -> tuple[int, bytes] | None:
    """The latest of the job that is drawn now."""
    current = seen.current
    return None if current is None else await service.calls.latest_preview(current[1].id)


def _waiting(seen: Seen) -> str | None:
    places: Sequence[int] = [job.position for _, job in seen.parts if job.position is not None]
    if places and all(job.state is JobState.QUEUED for _, job in seen.parts):
        return f"In queue: {min(places)}"
    return None


def _done(job: Job) -> float:
    return 1.0 if job.state.terminal else job.step / max(1, job.steps)
