"""A job's history as it happens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from serve.domain import JobEvent
from serve.jobs.store import JobStore

_LOOK_AGAIN_S = 5.0


async def follow(
    store: JobStore, job_id: str, after: str | None = None, *, previews: bool = True
) -> AsyncGenerator[JobEvent, None]:
    """The job's events from the first, or those after event id `after`; ends after the event of its terminal state.
    Without `previews` they are left out, and their files not fetched.

    Waiting holds no connection. Raises JobNotFound, BackendUnavailable, or InvalidRequest for an `after` that is no
    event id.
    """
    async with store.changes(job_id) as changed:
        while True:
            changed.clear()
            events, ended = await store.events_after(job_id, after, previews)
            for event in events:
                after = event.id
                if previews or event.index is None:
                    yield event
            if events:
                continue
            if ended:
                return
            # A ring is lost only with a connection that broke without a word.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await changed.wait()
