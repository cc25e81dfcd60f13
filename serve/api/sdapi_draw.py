"""A call of the A1111 dialect that draws: its jobs, from the first to the last, and its answer."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response

from serve.api.arrivals import arrival_of
from serve.api.dialects import in_words_of
from serve.api.middleware import release_body
from serve.api.sdapi_hires import Enlarged
from serve.api.sdapi_orders import course_of, echoed
from serve.api.sdapi_schemas import Answer, Drawing
from serve.api.sdapi_words import NAMES
from serve.api.waiting import Ended, Waiting, succeeded, told_of
from serve.callers import Caller
from serve.domain.jobs import Job, JobState
from serve.domain.orders import Arrival, ResizeMode, Task
from serve.errors import BackendUnavailable, QueueFull, RateLimited
from serve.inputs import settled
from serve.jobs.calls import Call, Part, started_now
from serve.jobs.terms import Submitted
from serve.orders import NewImage
from serve.results.info import info_json, infotexts
from serve.results.keys import reference
from serve.results.png import retold
from serve.service import ImageService

T = TypeVar("T")

_SPARE_S = 60.0
"""A call is known for so long after its answer must have gone out."""
_PATIENCE_S = 5.0
"""At most so long a second pass that found no room waits before it asks again."""


class Sitting(Waiting):
    """The jobs of one call.

    Owns: their ids, and what the job store knows of the call.
    """

    def __init__(self, service: ImageService, caller: Caller, call: Call) -> None:
        super().__init__(service)
        self._caller = caller
        self._call = call

    async def begin(self, within_s: float) -> None:
        await self._service.calls.begin_call(self._caller.owner, self._call, within_s)

    async def order(
        self, new: NewImage, names: Mapping[str, str], part: tuple[int, int, int], share: float, arrival: Arrival | None
    ) -> Submitted:
        """Submit a job: of this round, this pass, the one so many. It is cancelled where the round is to end by now.
        Raises what `submit` raises, in the dialect's `names`."""
        with in_words_of(names):
            submitted = await self._service.submit(new, self._caller, arrival=arrival)
        job_id = submitted.job.id
        self.note(job_id)
        if await self._service.calls.add_part(self._caller.owner, self._call.id, Part(*part, job_id, share)):
            return submitted
        return dataclasses.replace(submitted, job=await self._service.cancel(job_id, self._caller))

    async def stops(self, round_: int) -> bool:
        """Whether somebody has said that the round is to end."""
        call = await self._service.calls.call(self._caller.owner, self._call.id)
        return call is not None and call.stops(round_)

    async def over(self) -> None:
        """Nothing more comes of it. Where the store can't be told, it forgets in time."""
        with contextlib.suppress(BackendUnavailable):
            await self._service.calls.end_call(self._caller.owner, self._call.id)

    async def withdraw(self, within_s: float) -> None:
        await super().withdraw(within_s)
        await self.over()


@dataclass(frozen=True, slots=True)
class _Painter:
    """What is left of an order once it is queued: nothing of its pictures."""

    service: ImageService
    caller: Caller
    sitting: Sitting
    firsts: Sequence[Job]
    enlarged: Enlarged | None
    echo: Mapping[str, Any]
    within_s: float

    async def answer(self, first: Job, waiting: Waiting) -> Response:
        """`first` is the first round's first job, which has ended. Raises JobEnded where one fails: then the others
        are cancelled."""
        try:
            rounds = await _together([self._round(n, job) for n, job in enumerate((first, *self.firsts[1:]))])
            answer = await self._told([job for each in rounds for job in each])
        except Exception:
            await self.sitting.withdraw(self.within_s)
            raise
        await self.sitting.over()
        return Response(answer.model_dump_json(), media_type="application/json")

    async def _round(self, n: int, job: Job) -> Sequence[Job]:
        """Its last jobs, ended: those that were cancelled too. Where no picture has its second pass, as the first one
        left them, like there."""
        job = await self._ended(job)
        if self.enlarged is None or job.state is JobState.CANCELLED:
            return [job]
        seconds = await _together([self._second(n, job, ref.index) for ref in job.images])
        ended = [each for each in seconds if each is not None]
        return ended if any(each.state is JobState.SUCCEEDED for each in ended) else [job]

    async def _second(self, n: int, first: Job, index: int) -> Job | None:
        """A picture's second pass; None where the round was ended before. It waits for room as long as the call does:
        refused, it would take the first pass along."""
        assert self.enlarged is not None
        new, share = self.enlarged.of(first, index), 1 / (2 * len(self.firsts) * len(first.images))
        while not await self.sitting.stops(n):
            try:
                queued = await self.sitting.order(new, self.enlarged.names, (n, 1, index), share, None)
            except (QueueFull, RateLimited) as refusal:
                await asyncio.sleep(min(refusal.retry_after_s or 1.0, _PATIENCE_S))
            else:
                return await self._ended(queued.job)
        return None

    async def _ended(self, job: Job) -> Job:
        ended = job if job.state.terminal else await self.sitting.end(job.id, job.state)
        return ended if ended.state is JobState.CANCELLED else succeeded(ended)

    async def _told(self, jobs: Sequence[Job]) -> Answer:
        info = info_json(
            jobs,
            batch_size=self.firsts[0].request.num_images,
            styles=self.echo["styles"] or (),
            subseed=-1 if self.echo["subseed"] is None else self.echo["subseed"],
            more=self._more,
        )
        images: list[str] = []
        if self.echo["send_images"] is not False:
            refs = [(job, ref) for job in jobs for ref in job.images]
            texts = infotexts(jobs, self._more)
            images = [await self._picture(job, ref.index, text) for (job, ref), text in zip(refs, texts, strict=True)]
        return Answer(images=tuple(images), parameters=dict(self.echo), info=info)

    def _more(self, job: Job) -> dict[str, Any]:
        """What a job of the second pass does not say of its pictures."""
        if self.enlarged is None or job.request.task is Task.TXT2IMG:
            return {}
        first = self.firsts[0].request
        return {"Steps": first.num_inference_steps, "Size": f"{first.width}x{first.height}", **self.enlarged.told}

    async def _picture(self, job: Job, index: int, text: str) -> str:
        """In base64. One of two passes says so itself, too: a job knows its own alone."""
        data = await self.service.picture(job.id, str(index), self.caller)
        if self.enlarged is not None:
            data = await asyncio.to_thread(retold, data, text)
        return base64.b64encode(data).decode()


async def drawn(order: Drawing, request: Request, service: ImageService, caller: Caller) -> Ended:
    """Queue what an order comes to; the answer waits for the last of it. Raises what `submit` raises, and then nothing
    of the order is queued."""
    course = await course_of(order, service, caller)
    first = course.rounds[0]
    if course.enlarged is not None:
        with in_words_of(course.enlarged.names):
            await service.quote(course.enlarged.trial(first), caller)
    http, within_s = request.app.state.http, request.app.state.job_timeout_s
    stages = 1 if course.enlarged is None else 2
    call = started_now(order.force_task_id or f"task({secrets.token_hex(8)})", len(course.rounds), stages)
    sitting = Sitting(service, caller, call)
    await sitting.begin(http.wait_s + _SPARE_S)
    share = 1 / (stages * len(course.rounds))
    queued: list[Submitted] = []
    try:
        for n, new in enumerate(course.rounds):
            if queued:
                new = _from_kept(new, queued[0].job)
            queued.append(await sitting.order(new, NAMES, (n, 0, 0), share, None if queued else arrival_of(request)))
    except BaseException:
        await settled(sitting.withdraw(within_s))
        raise
    release_body(request)
    jobs = [each.job for each in queued]
    echo = echoed(order)
    painter = _Painter(service, caller, sitting, jobs, course.enlarged, echo, within_s)
    told = told_of(queued[-1], request.scope.get("root_path", "").rstrip("/"))
    cancels = within_s if http.cancel_on_disconnect else None
    return Ended(sitting, jobs[0].state, painter.answer, None, told, http.wait_s, cancels)


async def _together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all; where one fails, the others are called off."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def _from_kept(new: NewImage, first: Job) -> NewImage:
    """What a further round starts from is what the first one has stored: at its size, and the mask as it is meant."""
    image, mask = first.request.image, first.request.mask
    return dataclasses.replace(
        new,
        image=image and reference(image),
        mask=mask and reference(mask),
        mask_invert=False,
        resize_mode=ResizeMode.STRETCH,
    )
