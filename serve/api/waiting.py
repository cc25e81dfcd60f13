"""The synchronous form of an order: the answer comes when the job has ended, and whoever hangs up cancels it."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.middleware import release_body
from serve.api.schemas import JobView
from serve.domain import Job
from serve.errors import BackendUnavailable, TandemError
from serve.inputs import settled
from serve.orders import NewImage
from serve.service import ImageService

_GONE = 499
"""nginx's status for a caller who closed the connection; nobody reads it."""


async def ended(request: Request, service: ImageService, new: NewImage, root: str, within_s: float) -> Ended:
    """Submit the job; the answer waits for its end. `within_s`: jobs expire after so many seconds.

    From here on the body is forgotten, whose pictures may be large and the waiting long. Raises what `submit` raises.
    """
    submitting = asyncio.create_task(service.submit(new))
    try:
        job = await asyncio.shield(submitting)
    except asyncio.CancelledError:
        await settled(_undone(service, submitting, within_s))
        raise
    release_body(request)
    return Ended(service, job.id, root, within_s)


class Ended(Response):
    """The job when it has ended. It holds nothing of the order: what FastAPI keeps for a route ends with the route.

    A caller who goes away is heard of in two ways: uvicorn says so to whoever receives, Ray Serve also cancels this
    task. Either cancels the job. Raises BackendUnavailable, which names the job, when it can no longer be followed.
    """

    media_type = "application/json"

    def __init__(self, service: ImageService, job_id: str, root: str, within_s: float) -> None:
        super().__init__()
        self._service = service
        self._id = job_id
        self._root = root
        self._within_s = within_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            job = await self._followed(receive)
        except asyncio.CancelledError:
            await settled(self._service.withdraw(self._id, self._within_s))
            raise
        if job is None:
            await self._service.withdraw(self._id, self._within_s)
            answer = Response(status_code=_GONE)
        else:
            headers = {"Location": f"{self._root}/v1/jobs/{job.id}"}
            told = JobView.of(job, self._root).model_dump_json()
            answer = Response(told, media_type=self.media_type, headers=headers)
        await answer(scope, receive, send)

    async def _followed(self, receive: Receive) -> Job | None:
        """The ended job, or None when the caller has gone before."""
        waiting = asyncio.create_task(self._service.wait(self._id))
        gone = asyncio.create_task(_hung_up(receive))
        try:
            await asyncio.wait([waiting, gone], return_when=asyncio.FIRST_COMPLETED)
            return waiting.result() if waiting.done() else None
        except BackendUnavailable as error:
            told = f"{error.message}; job {self._id} goes on"
            raise BackendUnavailable(told, error.param, error.retry_after_s) from None
        finally:
            # Not awaited: the waiting may miss this (`asyncio.wait_for` loses a cancellation that meets its result),
            # and then ends with the job, which nobody would cancel if this waited for it.
            for task in (waiting, gone):
                task.cancel()
                task.add_done_callback(_heard)


async def _undone(service: ImageService, submitting: asyncio.Task[Job], within_s: float) -> None:
    """Submitted or not yet: what is logged must be cancelled, and only its id finds it."""
    try:
        job = await submitting
    except TandemError:
        return
    await service.withdraw(job.id, within_s)


def _heard(task: asyncio.Task[object]) -> None:
    """Nobody is left to hear how it failed."""
    if not task.cancelled():
        task.exception()


async def _hung_up(receive: Receive) -> None:
    """Returns when the caller has gone. The body has been read, so that nothing else can come."""
    while (await receive())["type"] != "http.disconnect":
        pass
