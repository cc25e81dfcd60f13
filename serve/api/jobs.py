"""The native dialect, `/v1/jobs`: order a job, look at it, follow it, cancel it. A caller sees the own jobs alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.sse import ServerSentEvent

from serve.api.arrivals import arrival_of
from serve.api.auth import Generates
from serve.api.errors import documented
from serve.api.events import EventStream, OpenEvents, stream
from serve.api.job_schemas import JobList, QuoteView
from serve.api.parts import GUARDED, JobId, OpenStreams, Root, Service
from serve.api.schemas import JobOrder, JobView
from serve.api.waiting import Waiting, ended, told_of
from serve.callers import Caller
from serve.domain.jobs import Job, JobState
from serve.errors import InvalidRequest
from serve.once import Once
from serve.orders import NewImage
from serve.service import ImageService

router = APIRouter(prefix="/v1/jobs", tags=["native"], responses=documented(401, 403, 503), dependencies=GUARDED)

_LONGEST_KEY = 255

Wait = Annotated[bool, Query(description="Answer when the job has ended.")]
DryRun = Annotated[bool, Query(description="Say what the order would come to; nothing is queued or kept.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="1 to 255 visible ASCII characters. The same key with the same order is the same job.",
    ),
]
States = Annotated[list[JobState], Query(alias="state", description="Jobs in these states alone.")]
PageSize = Annotated[int, Query(alias="limit", ge=1, le=100, description="Most jobs of a page.")]
Cursor = Annotated[str | None, Query(max_length=64, description="What the page before called `next`.")]

_DONE: dict[int | str, dict[str, Any]] = {
    200: {
        "model": JobView | QuoteView,
        "description": "With `wait`: the job has ended, as its `state` says. With `dry_run`: what it would come to",
    }
}


async def _once(request: Request, caller: Generates, key: IdempotencyKey = None) -> Once | None:
    if key is None:
        return None
    keys = request.headers.getlist("idempotency-key")
    if len(keys) > 1 or not 1 <= len(key) <= _LONGEST_KEY or not all("!" <= letter <= "~" for letter in key):
        raise InvalidRequest("Idempotency-Key must be 1 to 255 visible ASCII characters, sent once", "Idempotency-Key")
    return Once(key=key)


async def _counted(caller: Generates, streams: OpenStreams, wait: Wait = False) -> AsyncIterator[None]:
    """A wait is an open stream until its answer has ended."""
    with streams.one(caller.owner if wait else ""):
        yield


@router.post(
    "",
    status_code=202,
    response_model=JobView,
    dependencies=[Depends(_counted)],
    responses=documented(400, 404, 410, 413, 415, 422, 429) | _DONE,
)
async def create_job(
    order: JobOrder,
    service: Service,
    root: Root,
    caller: Generates,
    request: Request,
    response: Response,
    once: Annotated[Once | None, Depends(_once)],
    wait: Wait = False,
    dry_run: DryRun = False,
) -> Response | JobView:
    """Queue a job. Once this answers, the job survives a restart of any part of the server.

    With `?wait=true` it answers when the job has ended; whoever hangs up before cancels it, unless an `Idempotency-Key`
    lets them ask for it again. What takes longer than `http.wait_s` is a 202 too, and goes on. With `?dry_run=true` it
    answers what the order would come to.
    """
    if dry_run:
        return await _quoted(order, service, caller)
    return await _ordered(_new(order, caller), service, root, caller, request, response, once, wait)


@router.put(
    "/{id}",
    status_code=202,
    response_model=JobView,
    dependencies=[Depends(_counted)],
    responses=documented(400, 404, 410, 413, 415, 422, 429) | _DONE,
)
async def put_job(
    job_id: JobId,
    order: JobOrder,
    service: Service,
    root: Root,
    caller: Generates,
    request: Request,
    response: Response,
    wait: Wait = False,
    dry_run: DryRun = False,
) -> Response | JobView:
    """Queue a job under an id of your own: 32 random hex digits. The same order again is the same job.

    Whoever hangs up cancels nothing: the id finds the job. With `?dry_run=true` the id stays as it is.
    """
    if dry_run:
        return await _quoted(order, service, caller)
    once = Once(job_id=job_id)
    return await _ordered(_new(order, caller), service, root, caller, request, response, once, wait)


@router.get("", responses=documented(422))
async def list_jobs(
    service: Service,
    root: Root,
    caller: Generates,
    states: States = [],  # noqa: B006 -- FastAPI copies it
    limit: PageSize = 20,
    cursor: Cursor = None,
) -> JobList:
    """Your jobs, newest first, as long as their records are kept. A page may hold fewer than `limit` and go on: only
    `next` says. Where a job stands in the queue it says itself.
    """
    page = await service.jobs(caller, states, cursor, limit)
    return JobList(data=tuple(JobView.of(job, root) for job in page.jobs), next=page.next)


@router.get("/{id}", responses=documented(404))
async def get_job(job_id: JobId, service: Service, root: Root, caller: Generates) -> JobView:
    """The job as it is now."""
    return JobView.of(await service.get(job_id, caller), root)


@router.get("/{id}/events", response_class=EventStream, responses=documented(404, 422, 429))
async def follow_job(events: OpenEvents) -> AsyncIterator[ServerSentEvent]:
    """Server-Sent Events: `state` and `step` with JSON `{state, step, steps, attempt}`, from the job's first to its
    last. Where the order has `preview_every`, `preview` with `{state, step, steps, index, image}`, a small JPEG as a
    data URL; `?previews=false` leaves them out.

    `Last-Event-ID` resumes after that event. A comment every 15 seconds keeps the connection alive. The stream ends
    after the terminal state; `error` says why it ended early.
    """
    async for event in stream(events):
        yield event


@router.delete("/{id}", responses=documented(404))
async def cancel_job(job_id: JobId, service: Service, root: Root, caller: Generates) -> JobView:
    """Cancel: a queued job at once, a running one at its next step. A finished job stays as it is."""
    return JobView.of(await service.cancel(job_id, caller), root)


def _new(order: JobOrder, caller: Caller) -> NewImage:
    return NewImage(**order.model_dump(by_alias=True), salt=caller.salt)


async def _quoted(order: JobOrder, service: ImageService, caller: Caller) -> Response:
    told = QuoteView.of(await service.quote(_new(order, caller), caller), order)
    return Response(told.model_dump_json(), media_type="application/json")


async def _ordered(
    new: NewImage,
    service: ImageService,
    root: str,
    caller: Caller,
    request: Request,
    response: Response,
    once: Once | None,
    wait: bool,
) -> Response | JobView:
    if wait:
        return await _ended(new, service, root, caller, request, once)
    submitted = await service.submit(new, caller, once, arrival_of(request))
    response.headers.update(told_of(submitted, root))
    return JobView.of(submitted.job, root)


async def _ended(
    new: NewImage, service: ImageService, root: str, caller: Caller, request: Request, once: Once | None
) -> Response:
    """The job when it has ended; one that takes too long as it is then, with a 202."""

    async def render(job: Job, waiting: Waiting) -> Response:
        return _told(job, root)

    async def late() -> Response:
        return _told(await service.get(answer.job_id, caller), root, 202)

    answer = await ended(request, service, new, caller, render, once, late)
    return answer


def _told(job: Job, root: str, status: int = 200) -> Response:
    return Response(JobView.of(job, root).model_dump_json(), status, media_type="application/json")
