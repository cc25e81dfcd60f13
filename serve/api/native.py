"""The native dialect, `/v1`: order a job, look at it, follow it, cancel it, fetch its images."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import RedirectResponse
from fastapi.sse import ServerSentEvent

from serve.api.errors import documented
from serve.api.events import EventStream, OpenEvents, stream
from serve.api.model_schemas import BenchmarkOrder, BenchmarkReport, ModelList, ModelView
from serve.api.parts import ImageName, JobId, Root, Service, Tenant, Text
from serve.api.schemas import JobOrder, JobView
from serve.api.waiting import ended
from serve.orders import NewImage
from serve.results.keys import CONTENT_TYPES

router = APIRouter(prefix="/v1", tags=["native"], responses=documented(503))

_FILE = {"schema": {"type": "string", "format": "binary"}}

Wait = Annotated[bool, Query(description="Answer when the job has ended.")]


@router.post(
    "/jobs",
    status_code=202,
    response_model=JobView,
    responses=documented(400, 404, 413, 415, 422)
    | {200: {"model": JobView, "description": "With `wait`: the job has ended, as its `state` says"}},
)
async def create_job(
    order: JobOrder,
    service: Service,
    root: Root,
    tenant: Tenant,
    request: Request,
    response: Response,
    wait: Wait = False,
) -> Response | JobView:
    """Queue a job. Once this answers, the job survives a restart of any part of the server.

    With `?wait=true` it answers when the job has ended; whoever hangs up before cancels it.
    """
    new = NewImage(**order.model_dump(), salt=tenant)
    if wait:
        return await ended(request, service, new, root, request.app.state.job_timeout_s)
    job = await service.submit(new)
    response.headers["Location"] = f"{root}/v1/jobs/{job.id}"
    return JobView.of(job, root)


@router.get("/jobs/{id}", responses=documented(404))
async def get_job(job_id: JobId, service: Service, root: Root) -> JobView:
    """The job as it is now."""
    return JobView.of(await service.get(job_id), root)


@router.get("/jobs/{id}/events", response_class=EventStream, responses=documented(404, 422))
async def follow_job(events: OpenEvents) -> AsyncIterator[ServerSentEvent]:
    """Server-Sent Events: `state` and `step` with JSON `{state, step, steps}`, from the job's first to its last. Where
    the order has `preview_every`, `preview` with `{state, step, steps, index, image}`, a small JPEG as a data URL.

    `Last-Event-ID` resumes after that event. The stream ends after the terminal state; `error` says why it ended early.
    """
    async for event in stream(events):
        yield event


@router.delete("/jobs/{id}", responses=documented(404))
async def cancel_job(job_id: JobId, service: Service, root: Root) -> JobView:
    """Cancel: a queued job at once, a running one at its next step. A finished job stays as it is."""
    return JobView.of(await service.cancel(job_id), root)


@router.get(
    "/images/{id}/{index}",
    response_class=Response,
    responses=documented(404)
    | {
        200: {"description": "The image", "content": dict.fromkeys(CONTENT_TYPES.values(), _FILE)},
        304: {"description": "The client's copy is the image"},
        307: {"description": "The image is at the URL in `Location` for a while"},
    },
)
async def get_image(
    job_id: JobId, name: ImageName, service: Service, if_none_match: Annotated[str, Header()] = ""
) -> Response:
    """One image of a finished job by its index; `image` and `mask` are what the job starts from."""
    image = await service.image(job_id, name)
    if image.url is not None:
        return RedirectResponse(image.url, headers={"Cache-Control": "no-store"})
    data = image.data or b""
    etag = f'"{hashlib.blake2b(data, digest_size=16).hexdigest()}"'
    # A job's image is stored once and never again, so no copy of it can go stale.
    headers = {"ETag": etag, "Cache-Control": "private, max-age=31536000, immutable"}
    if any(tag.strip().removeprefix("W/") in (etag, "*") for tag in if_none_match.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=image.content_type, headers=headers | {"X-Content-Type-Options": "nosniff"})


@router.get("/models")
async def list_models(service: Service, texts: Text) -> ModelList:
    """The models that this server draws with, then those whose text alone it encodes."""
    drawn = {info.id: ModelView(images=True, **asdict(info)) for info in service.models()}
    others = {name: ModelView(id=name, family=family, images=False) for name, family in texts.models().items()}
    return ModelList(data=tuple((others | drawn)[name] for name in {**drawn, **others}))


@router.post("/benchmark", responses=documented(400, 404, 413, 415, 422, 429))
async def benchmark(order: BenchmarkOrder, service: Service) -> BenchmarkReport:
    """Time synthetic steps, one at a time. Jobs go on meanwhile, slower. Only where `http.benchmark` offers it."""
    found = await service.benchmark(order.model, order.width, order.height, order.num_inference_steps)
    return BenchmarkReport(**{name: getattr(found, name) for name in BenchmarkReport.model_fields})
