"""Ordering once more what could not be drawn."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import uuid

from serve.costs import Costs
from serve.domain.jobs import Job, JobState
from serve.errors import InvalidRequest, JobNotFound, TandemError
from serve.jobs.reading import NEWER
from serve.jobs.store import JobStore
from serve.jobs.terms import Terms
from serve.results.keys import content_type, input_key
from serve.results.store import ResultStore

RETRIED = (JobState.FAILED, JobState.EXPIRED, JobState.CANCELLED)


async def retry(store: JobStore, results: ResultStore, job_id: str, *, weight: float = 1.0) -> Job:
    """A new job with the order of one that ended without pictures, for the same owner, whose `weight` this is. It has
    copies of the pictures to start from, and outlives the old job, which stays what it is.

    No allowance of the owner is asked: the operator orders. Raises JobNotFound, also for a picture that is gone;
    InvalidRequest for a job that goes on or succeeded, and for an order that this release can't read; QueueFull,
    BackendUnavailable. Then nothing was queued or kept.
    """
    old = await store.get(job_id)
    if old.state not in RETRIED:
        raise InvalidRequest(
            f"job {job_id} is {old.state}: only what failed, expired or was cancelled is retried", "id"
        )
    if NEWER in old.notes:
        raise InvalidRequest(
            f"job {job_id} was ordered through a newer release: retry it with that one's command", "id"
        )
    new_id = uuid.uuid4().hex
    try:
        image = await _copy(results, new_id, "image", old.request.image)
        mask = await _copy(results, new_id, "mask", old.request.mask)
        request = dataclasses.replace(old.request, image=image, mask=mask)
        estimate = Costs().estimate(request, await store.crew(request.model))
        terms = Terms(
            owner=old.owner,
            weight=weight,
            priority=old.priority,
            cost_ms=estimate.cost_ms,
            alone_ms=estimate.alone_ms,
            replicas=estimate.replicas,
            webhook=old.webhook,
        )
        submitted = await store.submit(new_id, request, old.truncated, tokens=old.tokens, notes=old.notes, terms=terms)
        return submitted.job
    except BaseException:
        # A submission whose answer was lost may have queued the job: without its pictures it fails, and nobody waits.
        with contextlib.suppress(TandemError):
            await results.delete_job(new_id)
        raise


async def _copy(results: ResultStore, job_id: str, field: str, key: str | None) -> str | None:
    """The key of the job's own copy of what another starts from: that goes with the other job."""
    if key is None:
        return None
    copy = input_key(job_id, field, secrets.token_hex(4))
    try:
        data = await results.get(key)
    except JobNotFound:
        raise JobNotFound(f"the {field} that the job starts from is gone", field) from None
    await results.put(copy, data, content_type(copy))
    return copy
