"""The dialect of Imagen, a queue in front of SDXL: order a picture, ask how it stands, fetch the file.

Prompts have Compel's syntax and arithmetic, as that service had them, and its answers their French.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request, Response
from pydantic import ConfigDict, Field

from serve.api.arrivals import arrival_of
from serve.api.auth import KEYED, Generates
from serve.api.errors import documented
from serve.api.fields import FiniteNumber, Schema, Text
from serve.api.parts import JobId, Root, Service
from serve.api.waiting import told_of
from serve.domain.jobs import Job, JobState
from serve.domain.text import Syntax, Weighting
from serve.errors import InvalidRequest, JobNotFound
from serve.orders import NewImage
from serve.results.keys import CONTENT_TYPES

_FILE = {"schema": {"type": "string", "format": "binary"}}
_EXTENSIONS = {kind: extension for extension, kind in CONTENT_TYPES.items()}


class GenerationRequest(Schema):
    """What to draw, with the model's defaults for all that is not here. Other fields are ignored."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={"examples": [{"prompt": "a red circle", "negative_prompt": "blurry", "ip_strength": 0.0}]},
    )

    prompt: Text
    """What the picture shows, in Compel's syntax: `red++`, `(red circle)1.3`."""
    negative_prompt: Text | None = None
    """What it must not show."""
    ip_strength: Annotated[FiniteNumber, Field(ge=0, le=1)] = 0.0
    """Weight of a reference image. This server has none: anything but 0 is refused."""


class Queued(Schema):
    """The order is kept and will be drawn."""

    job_id: str
    status: Literal["queued"] = "queued"
    message: str
    """Says the place in the queue."""


class Meta(Schema):
    """Denoising steps."""

    current: int
    """Done."""
    total: int
    percent: int
    """Of them, rounded down."""


class Result(Schema):
    """The file of the picture."""

    status: Literal["success"] = "success"
    filename: str
    path: str
    url: str
    """`GET` it from this server."""
    seed: int
    """Repeats the picture, ordered by another dialect."""


class Status(Schema):
    """How the job stands. Fields that say nothing are left out."""

    job_id: str
    status: Literal["PENDING", "PROGRESS", "SUCCESS", "FAILURE"]
    message: str | None = None
    """The place in the queue, of one that waits."""
    meta: Meta | None = None
    """Of one that waits or is drawn."""
    result: Result | None = None
    """Of one that succeeded."""
    error: str | None = None
    """Why there is no picture, of one that failed, was cancelled or waited too long."""


router = APIRouter(tags=["imagen"], dependencies=KEYED)

FileName = Annotated[str, Path(alias="name", pattern=r"^[0-9a-f]{32}\.(png|jpg|webp)$")]


@router.post("/generate", responses=documented(429))
async def generate(
    order: GenerationRequest, service: Service, root: Root, caller: Generates, request: Request, response: Response
) -> Queued:
    """Queue a picture. A full queue is a 503."""
    if order.ip_strength:
        raise InvalidRequest("ip_strength must be 0: this server has no reference image", "ip_strength")
    new = NewImage(
        prompt=order.prompt,
        negative_prompt=order.negative_prompt,
        prompt_syntax=Syntax.COMPEL,
        prompt_weighting=Weighting.COMPEL,
        salt=caller.salt,
    )
    submitted = await service.submit(new, caller, None, arrival_of(request))
    response.headers.update(told_of(submitted, root))
    return Queued(job_id=submitted.job.id, message=_place(submitted.job))


@router.get("/status/{id}", response_model_exclude_none=True, responses=documented(404))
async def get_status(job_id: JobId, service: Service, root: Root, caller: Generates) -> Status:
    """The job as it is now."""
    job = await service.get(job_id, caller)
    if job.state is JobState.SUCCEEDED:
        name = _filename(job)
        result = Result(filename=name, path=f"outputs/{name}", url=f"{root}/outputs/{name}", seed=job.images[0].seed)
        return Status(job_id=job.id, status="SUCCESS", result=result)
    if job.state.terminal:
        error = job.error.message if job.error else f"the job is {job.state}"
        return Status(job_id=job.id, status="FAILURE", error=error)
    if job.state is JobState.QUEUED:
        return Status(job_id=job.id, status="PENDING", message=_place(job), meta=_meta(job))
    return Status(job_id=job.id, status="PROGRESS", meta=_meta(job))


@router.get(
    "/outputs/{name}",
    response_class=Response,
    responses=documented(404)
    | {200: {"description": "The picture", "content": dict.fromkeys(CONTENT_TYPES.values(), _FILE)}},
)
async def get_output(name: FileName, service: Service, caller: Generates) -> Response:
    """The file that a status names. It is never a redirect: that service's clients follow none."""
    job = await service.get(name.partition(".")[0], caller)
    if not job.images or name != _filename(job):
        raise JobNotFound(f"there is no file {name}", "name")
    data = await service.picture(job.id, "0", caller)
    headers = {"Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"}
    return Response(data, media_type=job.images[0].content_type, headers=headers)


def _place(job: Job) -> str:
    """The words of that service: its clients show them, or read the number out of them."""
    return f"Tâche en file d'attente. Position estimée: {job.position or 1}"


def _meta(job: Job) -> Meta:
    return Meta(current=job.step, total=job.steps, percent=100 * job.step // max(job.steps, 1))


def _filename(job: Job) -> str:
    """Of the job's first picture; orders of this dialect have one."""
    return f"{job.id}.{_EXTENSIONS[job.images[0].content_type]}"
