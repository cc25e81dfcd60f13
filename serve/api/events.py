"""A job's events as Server-Sent Events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated

from fastapi import Depends, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent

from serve.api.auth import Generates
from serve.api.dialects import ErrorBody
from serve.api.errors import public
from serve.api.parts import JobId, OpenStreams, Service
from serve.api.schemas import EventView, PreviewView
from serve.domain.jobs import JobEvent, JobState
from serve.errors import TandemError

Events = AsyncGenerator[JobEvent, None]
LastEventId = Annotated[
    str | None, Header(pattern=r"^[0-9]{1,19}-[0-9]{1,19}$", description="Begin behind the event of this id.")
]
Previews = Annotated[bool, Query(description="Whether previews are sent.")]

RETRY_MS = 2000
"""How long an EventSource is asked to wait before it connects again."""


class EventStream(EventSourceResponse):
    """FastAPI gives the stream its own media type; this one is what its page says of the route's errors."""

    media_type = "application/json"


async def _open(
    job_id: JobId,
    service: Service,
    caller: Generates,
    streams: OpenStreams,
    last_event_id: LastEventId = None,
    previews: Previews = True,
) -> AsyncIterator[Events]:
    """The job's events after `last_event_id`. An unknown job is a 404 here, before the answer has begun, and one stream
    too many a 429.

    The events are closed when the answer ends, whether the job or the client ended it.
    """
    with streams.one(caller.owner):
        events = await service.events(job_id, caller, last_event_id, previews=previews)
        try:
            yield events
        finally:
            await events.aclose()


OpenEvents = Annotated[Events, Depends(_open)]


async def stream(events: Events) -> AsyncIterator[ServerSentEvent]:
    """Events `step`, `preview` and `state`, each with an id to resume from; `error` when they can't go on."""
    yield ServerSentEvent(retry=RETRY_MS)
    try:
        async for event in events:
            if event.index is not None:
                if event.preview is not None:  # else a later one has taken its place
                    yield ServerSentEvent(id=event.id, event="preview", data=PreviewView.of(event))
                continue
            stepped = event.state is JobState.RUNNING and event.step > 0
            yield ServerSentEvent(id=event.id, event="step" if stepped else "state", data=EventView.of(event))
    except TandemError as error:
        yield ServerSentEvent(event="error", data=ErrorBody(error=public(error)[1]))
