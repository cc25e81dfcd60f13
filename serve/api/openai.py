"""OpenAI's Images API, `/v1/images`: its clients draw here without a change. `GET /v1/models` is in `native.py`."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from serve.api.auth import KEYED, Generates
from serve.api.dialects import in_words_of
from serve.api.errors import documented
from serve.api.openai_answers import ImagesAnswer, answer_of
from serve.api.openai_bodies import PictureOrder, documented_body
from serve.api.openai_orders import Asked, EditOrder, GenerationOrder, asked
from serve.api.openai_stream import streamed
from serve.api.parts import OpenStreams, Service
from serve.api.waiting import Waiting, ended, succeeded
from serve.callers import Caller
from serve.domain.jobs import Job
from serve.errors import InvalidRequest
from serve.service import ImageService

GENERATION, EDIT = "image_generation", "image_edit"


async def _counted(caller: Generates, streams: OpenStreams) -> AsyncIterator[None]:
    """Each call stays open until its job has ended."""
    with streams.one(caller.owner):
        yield


_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The pictures; with `stream` events `<kind>.partial_image`, `<kind>.completed` and `error`",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
_ANSWERS = documented(400, 404, 409, 413, 415, 422, 429, 500, 504) | _STREAM

router = APIRouter(
    prefix="/v1/images",
    tags=["openai"],
    responses=documented(401, 403, 503),
    dependencies=[*KEYED, Depends(_counted)],
)


@router.post("/generations", response_model=ImagesAnswer, responses=_ANSWERS)
async def generate_images(order: GenerationOrder, service: Service, caller: Generates, request: Request) -> Response:
    """Draw pictures of a prompt."""
    return await _drawn(asked(order, service.quality_steps, caller, GENERATION), service, caller, request)


@router.post("/edits", response_model=ImagesAnswer, responses=_ANSWERS, openapi_extra=documented_body())
async def edit_image(caller: Generates, order: PictureOrder, service: Service, request: Request) -> Response:
    """Draw a picture anew where a mask, or the picture itself, is transparent; without either, draw over all of it."""
    edit = _from_picture(order, service, caller)
    with in_words_of(edit.names):
        edit = await _masked(edit, service, caller)
    return await _drawn(edit, service, caller, request)


@router.post("/variations", response_model=ImagesAnswer, responses=_ANSWERS, openapi_extra=documented_body())
async def vary_image(caller: Generates, order: PictureOrder, service: Service, request: Request) -> Response:
    """Draw pictures that are like one. `strength` says how far they go from it; a prompt is not needed, and a mask not
    read."""
    said = {} if order.prompt or order.template else {"prompt": ""}
    varied = _from_picture(order.model_copy(update={"mask": None, **said}), service, caller)
    return await _drawn(varied, service, caller, request)


def _from_picture(order: EditOrder, service: ImageService, caller: Caller) -> Asked:
    picture = order.image if order.images is None else order.images
    if picture is None:
        raise InvalidRequest("image: there is no picture to start from", "image")
    return asked(order.model_copy(update={"image": picture}), service.quality_steps, caller, EDIT)


async def _masked(edit: Asked, service: ImageService, caller: Caller) -> Asked:
    """With a mask that says what to repaint by its white, where the client's says it by what is transparent. All that
    it leaves stays as it is, to the pixel."""
    new, source = edit.new, "image" if edit.new.mask is None else "mask"
    mask = await service.cut_out(new, source, caller)
    if mask is None and source == "image":
        return edit
    if mask is None:
        raise InvalidRequest("mask: nothing of it is transparent, so that nothing would be drawn", "mask")
    blur = 0.0 if new.mask_blur is None else new.mask_blur
    new = dataclasses.replace(new, mask=base64.b64encode(mask).decode(), mask_blur=blur)
    names = edit.names if source == "mask" else {**edit.names, "mask": edit.names.get("image", "image")}
    return dataclasses.replace(edit, new=new, names=names)


async def _drawn(order: Asked, service: ImageService, caller: Caller, request: Request) -> Response:
    answering, base = order.answering, str(request.base_url).rstrip("/")

    async def render(job: Job, waiting: Waiting) -> Response:
        found = await answer_of(succeeded(job), answering, service, caller, base)
        return Response(found.model_dump_json(exclude_none=True), media_type="application/json")

    with in_words_of(order.names):
        if answering.stream:
            return await streamed(request, service, order.new, caller, answering)
        return await ended(request, service, order.new, caller, render)
