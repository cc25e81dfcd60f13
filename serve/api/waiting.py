"""Synchronous calls: the answer comes when the job has ended, and whoever hangs up cancels it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve import errors
from serve.api import ratelimits
from serve.api.arrivals import arrival_of
from serve.api.errors import JobEnded, StillRunning, status_of
from serve.api.middleware import release_body
from serve.callers import Caller
from serve.domain.jobs import Job, JobState
from serve.inputs import settled
from serve.jobs.terms import Submitted
from serve.once import Once
from serve.orders import NewImage
from serve.service import ImageService

REPLAYED = "Idempotent-Replayed"
_GONE = 499
"""nginx's status for a caller who closed the connection; nobody reads it."""
_STATUS = {"queue_timeout": 503, "timed_out": 504}
"""By the code of a job's error, where no error of ours has it."""


class Waiting:
    """The jobs that one synchronous call waits for, one after the other.

    Owns: their ids.
    """

    def __init__(self, service: ImageService) -> None:
        self._service = service
        self.jobs: list[str] = []

    def note(self, job_id: str) -> None:
        """It is this call's: whoever hangs up cancels it."""
        self.jobs.append(job_id)

    async def end(self, job_id: str, state: JobState) -> Job:
        """The job when it has ended, which was just told to be in `state`. Raises BackendUnavailable that names it."""
        try:
            return await self._service.wait(job_id, state)
        except errors.BackendUnavailable as error:
            told = f"{error.message}; job {job_id} goes on"
            raise errors.BackendUnavailable(told, error.param, error.retry_after_s) from None

    async def withdraw(self, within_s: float) -> None:
        """Nobody waits any more."""
        for job_id in self.jobs:
            await self._service.withdraw(job_id, within_s)


Render = Callable[[Job, Waiting], Awaitable[Response]]
"""Makes the answer of a job that has ended. It may order further jobs, and note them."""


def told_of(submitted: Submitted, root: str) -> dict[str, str]:
    """The headers of an answer to an order."""
    replayed = {REPLAYED: "true"} if submitted.replayed else {}
    return {"Location": f"{root}/v1/jobs/{submitted.job.id}"} | replayed | ratelimits.headers(submitted.limits)


def succeeded(job: Job) -> Job:
    """The job, if it has its pictures. Raises JobEnded."""
    if job.state is JobState.SUCCEEDED:
        return job
    if job.state is JobState.CANCELLED:
        raise JobEnded(f"job {job.id} was cancelled", "cancelled", 409)
    if job.error is None:
        raise JobEnded(f"job {job.id} is {job.state}", job.state.value, 503)
    raise JobEnded(f"job {job.id}: {job.error.message}", job.error.code, _status(job.error.code))


def _status(code: str) -> int:
    if code in _STATUS:
        return _STATUS[code]
    kinds = (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TandemError))
    kind = next((kind for kind in kinds if kind.code == code), errors.TandemError)
    return status_of(kind) or 500


async def ended(
    request: Request,
    service: ImageService,
    new: NewImage,
    caller: Caller,
    render: Render,
    once: Once | None = None,
    late: Callable[[], Awaitable[Response]] | None = None,
) -> Ended:
    """Submit the job; the answer waits for its end.

    From here on the body is forgotten, whose pictures may be large and the waiting long: `render` must hold nothing of
    it either. `late` makes the answer where the wait grows too long, else that is StillRunning. Raises what `submit`
    raises.
    """
    submitted = await service.submit(new, caller, once, arrival_of(request))
    release_body(request)
    root: str = request.scope.get("root_path", "").rstrip("/")
    http, within_s = request.app.state.http, request.app.state.job_timeout_s
    waiting = Waiting(service)
    waiting.note(submitted.job.id)
    told = told_of(submitted, root)
    cancels = once is None and http.cancel_on_disconnect
    return Ended(waiting, submitted.job.state, render, late, told, http.wait_s, within_s if cancels else None)


class Ended(Response):
    """What `render` makes of the job when it has ended. It holds nothing of the order: what FastAPI keeps for a route
    ends with the route.

    A caller who goes away is heard of in two ways: uvicorn says so to whoever receives, Ray Serve also cancels this
    task. Either cancels the jobs, unless the caller can ask for them again. Raises BackendUnavailable, which names the
    job, when it can no longer be followed, and StillRunning.
    """

    def __init__(
        self,
        waiting: Waiting,
        state: JobState,
        render: Render,
        late: Callable[[], Awaitable[Response]] | None,
        told: Mapping[str, str],
        wait_s: float,
        within_s: float | None,
    ) -> None:
        """`state` is the first job's of just now, `told` are headers. The answer comes within `wait_s`. `within_s`: a
        job has ended after so many seconds; None where it is not cancelled."""
        super().__init__()
        self._waiting = waiting
        self._state = state
        self._render = render
        self._late = late
        self._told = told
        self._wait_s = wait_s
        self._within_s = within_s

    @property
    def job_id(self) -> str:
        """The one that was ordered last."""
        return self._waiting.jobs[-1]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._followed(receive)
        except asyncio.CancelledError:
            await settled(self._left())
            raise
        if answer is None:
            await settled(self._left())  # Ray Serve may say so in both ways, one after the other
            answer = Response(status_code=_GONE)
        for name, value in self._told.items():
            answer.headers.setdefault(name, value)
        await answer(scope, receive, send)

    async def _left(self) -> None:
        if self._within_s is not None:
            await self._waiting.withdraw(self._within_s)

    async def _answer(self) -> Response:
        """Raises TimeoutError, which reaches no further than `_followed`."""
        async with asyncio.timeout(self._wait_s):
            return await self._render(await self._waiting.end(self._waiting.jobs[0], self._state), self._waiting)

    def _still_running(self) -> StillRunning:
        error = StillRunning(
            f"not done within {self._wait_s:g} s; it goes on, and GET /v1/jobs/{self.job_id} tells when it is done. "
            "Order with POST /v1/jobs what takes so long"
        )
        error.location = self._told["Location"]
        return error

    async def _followed(self, receive: Receive) -> Response | None:
        """The answer, or None when the caller has gone before."""
        telling = asyncio.create_task(self._answer())
        gone = asyncio.create_task(hung_up(receive))
        try:
            await asyncio.wait([telling, gone], return_when=asyncio.FIRST_COMPLETED)
            return telling.result() if telling.done() else None
        except TimeoutError:
            if self._late is not None:
                return await self._late()
            raise self._still_running() from None
        finally:
            # Not awaited: a Redis that stalls would hold up the end of its subscription, and here the job's.
            for task in (telling, gone):
                task.cancel()
                task.add_done_callback(heard)


def heard(task: asyncio.Task[object]) -> None:
    """Nobody is left to hear how it failed."""
    if not task.cancelled():
        task.exception()


async def hung_up(receive: Receive) -> None:
    """Returns when the caller has gone. The body has been read, so that nothing else can come."""
    while (await receive())["type"] != "http.disconnect":
        pass
