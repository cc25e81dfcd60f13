"""The synchronous form of an order: the answer comes when the job has ended, and whoever hangs up cancels it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api import ratelimits
from serve.api.arrivals import arrival_of
from serve.api.middleware import release_body
from serve.api.schemas import JobView
from serve.callers import Caller
from serve.domain import Job, JobState
from serve.errors import BackendUnavailable
from serve.inputs import settled
from serve.jobs.terms import Submitted
from serve.once import Once
from serve.orders import NewImage
from serve.service import ImageService

REPLAYED = "Idempotent-Replayed"
_GONE = 499
"""nginx's status for a caller who closed the connection; nobody reads it."""


def told_of(submitted: Submitted, root: str) -> dict[str, str]:
    """The headers of an answer to an order."""
    replayed = {REPLAYED: "true"} if submitted.replayed else {}
    return {"Location": f"{root}/v1/jobs/{submitted.job.id}"} | replayed | ratelimits.headers(submitted.limits)


async def ended(
    request: Request, service: ImageService, new: NewImage, caller: Caller, once: Once | None, root: str
) -> Ended:
    """Submit the job; the answer waits for its end.

    From here on the body is forgotten, whose pictures may be large and the waiting long. Raises what `submit` raises.
    """
    submitted = await service.submit(new, caller, once, arrival_of(request))
    release_body(request)
    within_s: float = request.app.state.job_timeout_s
    job = submitted.job
    return Ended(service, job.id, job.state, told_of(submitted, root), root, None if once else within_s)


class Ended(Response):
    """The job when it has ended. It holds nothing of the order: what FastAPI keeps for a route ends with the route.

    A caller who goes away is heard of in two ways: uvicorn says so to whoever receives, Ray Serve also cancels this
    task. Either cancels the job, unless the caller can ask for it again. Raises BackendUnavailable, which names the
    job, when it can no longer be followed.
    """

    media_type = "application/json"

    def __init__(
        self,
        service: ImageService,
        job_id: str,
        state: JobState,
        told: Mapping[str, str],
        root: str,
        within_s: float | None,
    ) -> None:
        """`state` is the job's of just now, `told` are headers. `within_s`: a job has ended after so many seconds; None
        where it is not cancelled."""
        super().__init__()
        self._service = service
        self._id = job_id
        self._state = state
        self._told = told
        self._root = root
        self._within_s = within_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            job = await self._followed(receive)
        except asyncio.CancelledError:
            await settled(self._left())
            raise
        if job is None:
            await settled(self._left())  # Ray Serve may say so in both ways, one after the other
            answer = Response(status_code=_GONE)
        else:
            told = JobView.of(job, self._root).model_dump_json()
            answer = Response(told, media_type=self.media_type, headers=dict(self._told))
        await answer(scope, receive, send)

    async def _left(self) -> None:
        """Nobody waits any more."""
        if self._within_s is not None:
            await self._service.withdraw(self._id, self._within_s)

    async def _followed(self, receive: Receive) -> Job | None:
        """The ended job, or None when the caller has gone before."""
        waiting = asyncio.create_task(self._service.wait(self._id, self._state))
        gone = asyncio.create_task(_hung_up(receive))
        try:
            await asyncio.wait([waiting, gone], return_when=asyncio.FIRST_COMPLETED)
            return waiting.result() if waiting.done() else None
        except BackendUnavailable as error:
            told = f"{error.message}; job {self._id} goes on"
            raise BackendUnavailable(told, error.param, error.retry_after_s) from None
        finally:
            # Not awaited: a Redis that stalls would hold up the end of its subscription, and here the job's.
            for task in (waiting, gone):
                task.cancel()
                task.add_done_callback(_heard)


def _heard(task: asyncio.Task[object]) -> None:
    """Nobody is left to hear how it failed."""
    if not task.cancelled():
        task.exception()


async def _hung_up(receive: Receive) -> None:
    """Returns when the caller has gone. The body has been read, so that nothing else can come."""
    while (await receive())["type"] != "http.disconnect":
        pass
