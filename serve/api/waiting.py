"""The synchronous form of an order: the answer comes when the job has ended, and whoever hangs up cancels it."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.requests import Request

from serve.domain import Job
from serve.errors import BackendUnavailable, TandemError
from serve.orders import NewImage
from serve.service import ImageService


async def ended(request: Request, service: ImageService, new: NewImage) -> Job:
    """Submit the job and wait for its end.

    A caller who goes away is heard of in two ways: uvicorn says so to whoever receives, Ray Serve also cancels this
    task. Either cancels the job. Raises what `submit` raises, and BackendUnavailable, which names the job, when it can
    no longer be followed.
    """
    submitting = asyncio.create_task(service.submit(new))
    try:
        job = await asyncio.shield(submitting)
        return await _followed(request, service, job)
    except asyncio.CancelledError:
        # Submitted or not yet: what is logged must be cancelled, and only its id finds it.
        with contextlib.suppress(TandemError):
            await service.cancel((await submitting).id)
        raise


async def _followed(request: Request, service: ImageService, job: Job) -> Job:
    waiting = asyncio.create_task(service.wait(job.id))
    gone = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait([waiting, gone], return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            return await service.cancel(job.id)  # nobody reads this answer
        return waiting.result()
    except BackendUnavailable as error:
        told = f"{error.message}; job {job.id} goes on"
        raise BackendUnavailable(told, error.param, error.retry_after_s) from None
    finally:
        # Not awaited: the waiting may miss this (`asyncio.wait_for` loses a cancellation that meets its result), and
        # then ends with the job, which nobody would cancel if this waited for it.
        for task in (waiting, gone):
            task.cancel()
            task.add_done_callback(_heard)


def _heard(task: asyncio.Task[object]) -> None:
    """Nobody is left to hear how it failed."""
    if not task.cancelled():
        task.exception()


async def _hung_up(request: Request) -> None:
    """Returns when the caller has gone. The body has been read, so that nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
