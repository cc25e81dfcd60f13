"""The loops that give lapsed leases back, end what is overdue, and delete what nobody may ask for any more. Any number
of processes may run them."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import Protocol

from serve.errors import TandemError
from serve.jobs.store import JobStore

log = logging.getLogger(__name__)

PAGE = 100
DELETIONS = 4
"""Jobs whose objects are deleted at a time. Each may hold a thread for as long as the result store lets it wait."""
TRY_AGAIN_S = 30.0
"""When a job is tried again whose objects could not be deleted."""


class Objects(Protocol):
    """What of a result store this needs."""

    async def delete_job(self, job_id: str) -> None:
        """Everything that is kept for the job; nothing happens where there is nothing."""


async def sweep(store: JobStore, results: Objects, lease_s: float, interval_s: float = 1.0) -> None:
    """Reap and delete until cancelled, beside each other: a slow result store holds up no lease.

    Only what a record tells of is deleted. Objects without a record (a put that came after the deletion, an upload
    whose order was never logged) stay: they look like all those of a job Redis that was restored from an older file,
    or of another one that shares the folder or bucket, and no deletion can be taken back.
    """
    async with asyncio.TaskGroup() as group:
        group.create_task(_reap(store, lease_s, interval_s))
        group.create_task(_tidy(store, results, interval_s))


async def _reap(store: JobStore, lease_s: float, interval_s: float) -> None:
    """Nobody could renew a lease while the store was away. So once it is back, and when this process is new, the
    workers have the time of one lease to speak first."""
    away = True
    while True:
        pause_s = interval_s
        try:
            await store.queue_depth()
            if away:
                away, pause_s = False, lease_s
            elif reaped := await store.reap():
                log.warning("%d jobs had lost their worker or their time", reaped)
        except TandemError as error:
            away = True
            log.warning("sweeping: %s", error.message)
        await asyncio.sleep(pause_s)


async def _tidy(store: JobStore, results: Objects, interval_s: float) -> None:
    """Page after page while there are any; then look again after the interval."""
    while True:
        more = False
        try:
            if due := await store.overdue(PAGE):
                more = await _delete(store, results, due) and len(due) == PAGE
        except TandemError as error:
            log.warning("deleting what is overdue: %s", error.message)
        if not more:
            await asyncio.sleep(interval_s)


async def _delete(store: JobStore, results: Objects, job_ids: Sequence[str]) -> bool:
    """The objects, then the records: a crash in between leaves a record, and the next sweep finds nothing left to
    delete. Where an object stays, so does the record, for a while, and the others' turn comes. Whether any went."""
    room = asyncio.Semaphore(DELETIONS)
    gone, kept, reason = [], [], ""

    async def delete(job_id: str) -> None:
        nonlocal reason
        async with room:
            try:
                await results.delete_job(job_id)
            except TandemError as error:
                reason = error.message
                kept.append(job_id)
            except Exception:  # one job must not keep all others from being swept
                log.exception("deleting what job %s has left", job_id)
                kept.append(job_id)
            else:
                gone.append(job_id)

    # Several processes have the same page: each begins elsewhere.
    await asyncio.gather(*map(delete, random.sample(job_ids, len(job_ids))))
    if forgotten := await store.forget(gone):
        log.info("%d jobs' records and pictures are deleted, their time is over", forgotten)
    if await store.put_off(kept, TRY_AGAIN_S):
        log.warning("the pictures of %d jobs can't be deleted yet: %s", len(kept), reason or "see above")
    return bool(gone)
