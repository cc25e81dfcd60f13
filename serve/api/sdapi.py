"""The A1111 dialect, `/sdapi/v1`: drawing, and what a caller has under way. Its lists, its options and what it reads in
files are in files of their own, whose routes are among these."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from serve.api import sdapi_lists, sdapi_options, sdapi_png, sdapi_tasks
from serve.api.auth import KEYED, Generates
from serve.api.errors import documented
from serve.api.parts import OpenStreams, Service
from serve.api.sdapi_draw import drawn
from serve.api.sdapi_schemas import Answer, ImageToImage, Progress, TaskProgress, TaskQuestion, TextToImage

router = APIRouter(tags=["a1111"], dependencies=KEYED)
router.include_router(sdapi_lists.router)
router.include_router(sdapi_options.router)
router.include_router(sdapi_png.router)


async def _counted(caller: Generates, streams: OpenStreams) -> AsyncIterator[None]:
    """A synchronous call is an open stream until its answer has ended."""
    with streams.one(caller.owner):
        yield


_DRAWS: dict[str, Any] = {
    "response_model": Answer,
    "dependencies": [Depends(_counted)],
    "responses": documented(404, 409, 410, 422, 429, 503, 504),
}
SkipImage = Annotated[bool, Query(description="Leave the preview out.")]


@router.post("/sdapi/v1/txt2img", **_DRAWS)
async def a1111_txt2img(order: TextToImage, request: Request, service: Service, caller: Generates) -> Response:
    """Draw from text. The answer comes with the pictures; whoever hangs up before cancels them."""
    return await drawn(order, request, service, caller)


@router.post("/sdapi/v1/img2img", **_DRAWS)
async def a1111_img2img(order: ImageToImage, request: Request, service: Service, caller: Generates) -> Response:
    """Draw from an image, or repaint the white part of `mask` in it."""
    return await drawn(order, request, service, caller)


@router.get("/sdapi/v1/progress", responses=documented(503))
async def a1111_progress(service: Service, caller: Generates, skip_current_image: SkipImage = False) -> Progress:
    """How far your newest synchronous order has come, at whichever replica of the server it waits."""
    return await sdapi_tasks.progress(service, caller, image=not skip_current_image)


@router.post("/internal/progress", responses=documented(503))
async def a1111_task_progress(question: TaskQuestion, service: Service, caller: Generates) -> TaskProgress:
    """How far the order with this `force_task_id` has come. Of one that is not known nothing is true."""
    after = -1 if question.id_live_preview is None else question.id_live_preview
    image = question.live_preview is not False
    return await sdapi_tasks.progress_of(service, caller, question.id_task or "", after=after, image=image)


@router.post("/sdapi/v1/interrupt", responses=documented(503))
async def a1111_interrupt(service: Service, caller: Generates) -> dict[str, Any]:
    """End your synchronous orders: each answers with the pictures that are finished."""
    await sdapi_tasks.interrupt(service, caller)
    return {}


@router.post("/sdapi/v1/skip", responses=documented(503))
async def a1111_skip(service: Service, caller: Generates) -> dict[str, Any]:
    """End the job that your newest synchronous order is at; with `n_iter` the next one is drawn."""
    await sdapi_tasks.skip(service, caller)
    return {}
