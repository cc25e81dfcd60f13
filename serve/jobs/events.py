"""A job's history as it happens, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

from serve.domain.jobs import Job, JobEvent, JobState
from serve.jobs.store import JobStore
from serve.jobs.submissions import EVENTS_PAGE

SETTLE_S = 0.05
"""Between two reads of a job's stream: what comes meanwhile is read together."""
LOOK_AGAIN_S = 10.0
"""A ring is lost only with a connection that broke without a word; a release before this one's settlements ring for no
end."""


async def follow(
    store: JobStore, job_id: str, after: str | None = None, *, previews: bool = True
) -> AsyncGenerator[JobEvent, None]:
    """The job's events from the first, or those after event id `after`; ends after the event of its terminal state.
    Without `previews` they are left out, and their files not fetched.

    The first events and the end come at once, the steps of a fast job several at a time. Waiting holds no connection.
    Raises JobNotFound, BackendUnavailable, or InvalidRequest for an `after` that is no event id.
    """
    async with store.changes(job_id) as changed, store.ends(job_id) as over:
        await _rung(changed, SETTLE_S)  # as the subscription takes effect: an earlier look would have to be repeated
        while True:
            changed.clear()
            over.clear()
            began = time.monotonic()
            events, ended = await store.events_after(job_id, after, previews, tell=True)
            for event in events:
                after = event.id
                if previews or event.index is None:
                    yield event
            if len(events) == EVENTS_PAGE:
                continue
            if ended:
                return
            await _rung(changed, LOOK_AGAIN_S)
            await _rung(over, began + SETTLE_S - time.monotonic())


async def end_of(store: JobStore, job_id: str, state: JobState) -> Job:
    """The job when it has ended. `state` is what it was in some seconds ago at most: then nobody looks before it rings.

    Waiting holds no connection. Raises JobNotFound or BackendUnavailable.
    """
    async with store.ends(job_id) as over:
        if not state.terminal:
            await _rung(over, LOOK_AGAIN_S)
        while True:
            over.clear()
            job = await store.ended(job_id)
            if job is not None:
                return job
            await _rung(over, LOOK_AGAIN_S)


async def _rung(event: asyncio.Event, within_s: float) -> None:
    """Wait for the event, but not for longer."""
    if within_s > 0 and not event.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await event.wait()
