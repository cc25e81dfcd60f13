"""A picture as OpenAI's clients see it come: previews, then the file, as Server-Sent Events."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.arrivals import arrival_of
from serve.api.dialects import ErrorBody
from serve.api.errors import public
from serve.api.middleware import release_body
from serve.api.openai_answers import file_of, made_at, revised_prompt, size_of, usage_of
from serve.api.openai_orders import Answering
from serve.api.waiting import heard, hung_up, succeeded, told_of
from serve.callers import Caller
from serve.domain.jobs import Job, JobEvent
from serve.errors import TandemError
from serve.inputs import settled
from serve.orders import NewImage
from serve.results.partial import partial_image
from serve.service import ImageService

PING_S = 15.0
"""Between two comments that keep the connection alive."""
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Nothing on the way holds events back."""


async def streamed(
    request: Request, service: ImageService, new: NewImage, caller: Caller, answering: Answering
) -> Streamed:
    """Submit the job; the answer tells its events. Raises what `submit` raises."""
    submitted = await service.submit(new, caller, None, arrival_of(request))
    release_body(request)
    root: str = request.scope.get("root_path", "").rstrip("/")
    http, within_s = request.app.state.http, request.app.state.job_timeout_s
    told = told_of(submitted, root)
    return Streamed(service, submitted.job, caller, answering, told, within_s if http.cancel_on_disconnect else None)


class Streamed(Response):
    """The events of a job, and its pictures at the end. Whoever hangs up cancels the job. It holds nothing of the
    order's pictures."""

    media_type = "text/event-stream"

    def __init__(
        self,
        service: ImageService,
        job: Job,
        caller: Caller,
        answering: Answering,
        told: Mapping[str, str],
        within_s: float | None,
    ) -> None:
        """`told` are headers. `within_s`: the job has ended after so many seconds; None where it is not cancelled."""
        super().__init__(headers={**_HEADERS, **told})
        del self.headers["content-length"]
        self._service = service
        self._job = job
        self._caller = caller
        self._answering = answering
        self._within_s = within_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        telling = asyncio.create_task(self._tell(send))
        others = [asyncio.create_task(_ping(send)), asyncio.create_task(hung_up(receive))]
        try:
            await asyncio.wait([telling, others[-1]], return_when=asyncio.FIRST_COMPLETED)
            whole = telling.done()
        except asyncio.CancelledError:
            await settled(self._left())
            raise
        finally:
            for task in (telling, *others):
                task.cancel()
                task.add_done_callback(heard)
        if whole:
            telling.result()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await settled(self._left())

    async def _left(self) -> None:
        """Nobody listens any more."""
        if self._within_s is not None:
            await self._service.withdraw(self._job.id, self._within_s)

    async def _tell(self, send: Send) -> None:
        """All but the end of the answer."""
        try:
            async with contextlib.aclosing(self._events()) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except TandemError as error:
            told = _event("error", ErrorBody(error=public(error)[1]).model_dump())
            await send({"type": "http.response.body", "body": told, "more_body": True})

    async def _events(self) -> AsyncGenerator[bytes, None]:
        job, wanted = self._job, self._answering.partial
        history = await self._service.events(job.id, self._caller, previews=wanted > 0)
        sent: Counter[int] = Counter()
        async with contextlib.aclosing(history):
            async for event in history:
                if event.preview is not None and _due(event, sent[event.index or 0], wanted):
                    yield await self._partial(event, sent[event.index or 0])
                    sent[event.index or 0] += 1
        job = succeeded(await self._service.get(job.id, self._caller))
        for ref in job.images:
            first = ref.index == job.images[0].index
            file = await file_of(job, ref, self._service, self._caller)
            told = self._told(job, file, made_at(job), ref.index) | {
                "usage": usage_of(job, 1, given=first).model_dump(),
                "seed": ref.seed,
                "job": job.id,
            }
            revised = revised_prompt(job, self._answering)
            yield _event(f"{self._answering.kind}.completed", told | ({"revised_prompt": revised} if revised else {}))

    async def _partial(self, event: JobEvent, number: int) -> bytes:
        job = self._job
        file = await asyncio.to_thread(partial_image, event.preview or b"", job.request)
        told = self._told(job, base64.b64encode(file).decode(), int(time.time()), event.index or 0)
        return _event(f"{self._answering.kind}.partial_image", told | {"partial_image_index": number})

    def _told(self, job: Job, file: str, at: int, index: int) -> dict[str, Any]:
        """What both kinds of events say. `index` says of which picture: OpenAI's own streams have one alone."""
        return {
            "b64_json": file,
            "created_at": at,
            "size": size_of(job),
            "quality": self._answering.quality,
            "background": "opaque",
            "output_format": job.request.output_format,
            "index": index,
        }


def _due(event: JobEvent, sent: int, wanted: int) -> bool:
    """Partial picture i of n comes at i + 1 parts of n + 1 of the steps."""
    return sent < wanted and event.step * (wanted + 1) >= event.steps * (sent + 1)


def _event(kind: str, told: dict[str, Any]) -> bytes:
    """`type` names it in the data too: clients read that."""
    return format_sse_event(event=kind, data_str=json.dumps({"type": kind, **told}))


async def _ping(send: Send) -> None:
    while True:
        await asyncio.sleep(PING_S)
        await send({"type": "http.response.body", "body": KEEPALIVE_COMMENT, "more_body": True})
