"""Jobs in Redis: what was accepted is never lost, and ends once. Every transition is one script in `scripts/`.

The store needs one Redis (6.2 or later) with `noeviction` and an append-only file, or its replicated equivalent; not
Redis Cluster, because a claim chooses among jobs that would lie on different shards.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from serve.domain import ImageRef, ImageRequest, Job, JobError, JobEvent, JobState, Preview, Tier, Timings, Truncation
from serve.errors import InvalidRequest, JobNotFound, LeaseLost, QueueFull
from serve.jobs import records
from serve.jobs.bell import Bell
from serve.jobs.connection import Connection, milliseconds
from serve.jobs.integrity import violations
from serve.jobs.records import Claim, Want, step_of, steps_of
from serve.jobs.renewals import Renewals
from serve.settings import JobSettings
from serve.telemetry.metrics import Metrics

__all__ = ["Claim", "JobStore", "Want"]

WORKER_LOST = JobError(code="worker_lost", message="the worker died or was cut off, in every attempt")
TIMED_OUT = JobError(code="timed_out", message="the job was not finished in time")

Fields = Mapping[str, str | bytes | int]

_LONGEST_RETRY_AFTER_S = 60.0
_REAP_PAGE, _EVENTS_PAGE = 100, 200
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_EVENT_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")


class JobStore:
    """The jobs, as every process of the server sees them. Every method may raise BackendUnavailable.

    Owns: this process's connections to the job Redis, and its bell.
    """

    def __init__(self, settings: JobSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._connection = Connection(settings, metrics)
        self._redis = self._connection.redis
        self._run = self._connection.run
        self._renewals = Renewals(self._renew_all)
        self._bell = Bell(self._redis)

    async def submit(self, job_id: str, request: ImageRequest, truncated: Sequence[Truncation] = ()) -> Job:
        """Log a job durably and queue it. The same id again is the same job. QueueFull: nothing was logged."""
        if not _ID.fullmatch(job_id):
            raise ValueError("a job id is 1 to 64 letters, digits, hyphens and underscores")
        fields: Fields = {
            "request": records.REQUEST.dump_json(request),
            "truncated": records.TRUNCATED.dump_json(tuple(truncated)),
            "model": request.model,
            "pixels": request.pixels,
            "steps": steps_of(request),
        }
        timeout_ms = milliseconds(self._settings.timeout_s)
        status, answer = await self._run("submit", job_id, self._settings.max_queued, timeout_ms, *_flat(fields))
        if status == b"full":
            wait_s = min(max(answer / 1000, 1.0), _LONGEST_RETRY_AFTER_S)
            raise QueueFull(f"{self._settings.max_queued} jobs are waiting already", retry_after_s=wait_s)
        return _found(job_id, answer)

    async def get(self, job_id: str) -> Job:
        """JobNotFound for an id that was never given, and once the record's time to live is over."""
        return _found(job_id, await self._run("get", _checked(job_id)))

    async def claim(self, worker: str, wants: Sequence[Want]) -> Claim | None:
        """Lease the oldest queued job that satisfies the first want which any queued job satisfies, None if none does.

        So a later want is only served where nothing queued satisfies an earlier one. Jobs are as old as their
        submission; `waited_s` counts from when a job last joined the queue, which a retry and a release do again. Jobs
        whose time is over are passed over. It is one step of Redis and one pass over the queue.
        """
        flat = [part for want in wants for part in (want.model, want.above, want.upto, round(want.waited_s * 1000))]
        reply = await self._run("claim", worker, milliseconds(self._settings.lease_s), *flat)
        return None if reply is None else records.claim(reply)

    async def renew(self, claim: Claim, step: int = 0) -> bool:
        """Renew the lease and tell the progress; `step` counts denoising steps done and never goes back.

        False: the client cancelled the job. LeaseLost: the claim is over. Renewals made together travel together.
        """
        return _held(claim, await self._renewals.renew(claim, step)) == b"held"

    async def preview(self, claim: Claim, *previews: Preview) -> None:
        """Put previews into the job's stream in this order, each in place of its image's former one, as one write.
        LeaseLost: nothing was written.

        They are no sign of life and no progress. The job's end takes them with it.
        """
        flat = [
            part for each in previews for part in (each.index, step_of(claim.request, each.step, each.steps), each.data)
        ]
        _held(claim, await self._run("preview", claim.job_id, claim.fence, *flat))

    def cancels(self, claim: Claim, event: asyncio.Event) -> AbstractAsyncContextManager[asyncio.Event]:
        """Meanwhile `event` is set when the client cancels the claimed job; it may be set without reason."""
        return self._bell.listening(f"tandem:cancel:{claim.job_id}", event)

    async def succeed(
        self,
        claim: Claim,
        *,
        images: Sequence[ImageRef],
        cache: Mapping[str, Tier],
        timings: Timings,
        approximate: Sequence[str] = (),
    ) -> Mapping[str, Tier]:
        """End the job with its stored images. `cache` says for each unit key where it came from, `approximate` what
        kept the images from being exact.

        Returns the same with what the text encoded ahead has cost, so that it is counted once: nothing, where this
        settlement was made before. LeaseLost where the claim is over: the result does not count. Like every settlement
        (`fail`, `cancelled`, `release`) it may be repeated when its answer was lost.
        """
        fields: Fields = {
            "images": records.IMAGES.dump_json(tuple(images)),
            "cache": records.TIERS.dump_json(dict(cache)),
            "timings": records.TIMINGS.dump_json(timings),
            "approximate": records.APPROXIMATE.dump_json(tuple(approximate)),
            "step": steps_of(claim.request),
        }
        ahead = await self._settle(claim, "succeeded", **fields)
        return {} if ahead is None else records.tiers(ahead, cache)

    async def fail(self, claim: Claim, error: JobError, *, retry: bool) -> None:
        """End the attempt. With `retry` the job waits again at its old place while attempts remain, else it failed."""
        await self._settle(claim, "retry" if retry else "failed", error=records.ERROR.dump_json(error))

    async def cancelled(self, claim: Claim) -> None:
        """The worker stopped because the client no longer wants the job."""
        await self._settle(claim, "cancelled")

    async def release(self, claim: Claim) -> None:
        """Give an unfinished job back to its old place in the queue; the attempt does not count."""
        await self._settle(claim, "release")

    async def cancel(self, job_id: str) -> Job:
        """A queued job ends at once, a running one when its worker hears of it, an ended one stays what it is."""
        return _found(job_id, await self._run("cancel", _checked(job_id)))

    async def note_ahead(self, job_id: str, units: Mapping[str, Tier]) -> None:
        """Tell where each text unit came from when the text was encoded while the job waits."""
        await self._run("ahead", _checked(job_id), records.TIERS.dump_json(dict(units)))

    async def reap(self) -> int:
        """Give the jobs of lapsed leases back or fail them, and expire those past their time. Returns how many."""
        told = [records.ERROR.dump_json(error) for error in (WORKER_LOST, TIMED_OUT)]
        total = 0
        while True:
            reaped: int = await self._run("reap", self._settings.max_attempts, _REAP_PAGE, *told)
            total += reaped
            if reaped < _REAP_PAGE:
                return total

    async def wait_for_work(self, timeout_s: float) -> None:
        """Return when a job was queued, at the latest after `timeout_s`. May return early, never raises."""
        rung = self._bell.work()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(rung.wait(), timeout_s)
        rung.clear()

    async def events_after(self, job_id: str, after: str | None, previews: bool = True) -> tuple[list[JobEvent], bool]:
        """The next entries of the job's stream, at most a page, and whether the job had ended by then. Without
        `previews` their files stay in Redis, and the events that tell of them have an `index` alone."""
        if after is not None and not _EVENT_ID.fullmatch(after):
            raise InvalidRequest("the id of the last event has the form 1700000000000-0", "after")
        start = "-" if after is None else f"({after}"
        state, entries, files = await self._run("events", _checked(job_id), start, _EVENTS_PAGE, int(previews))
        if state is None:
            raise _unknown()
        events = [records.event(entry, file) for entry, file in zip(entries, files, strict=True)]
        return events, JobState(state.decode()).terminal

    def changes(self, job_id: str) -> AbstractAsyncContextManager[asyncio.Event]:
        """An event that is set when the job's stream grew; it may be set without reason."""
        return self._bell.listening(f"tandem:events:{_checked(job_id)}")

    async def queue_depth(self) -> int:
        """How many jobs wait."""
        depth: int = await self._connection.guarded(self._redis.zcard("tandem:queue"))
        self._metrics.set("tandem_queue_depth", depth)
        return depth

    async def ping(self) -> None:
        """BackendUnavailable unless the store answers."""
        await self._connection.guarded(self._redis.ping())

    async def close(self) -> None:
        await self._bell.close()
        await self._redis.aclose()

    async def check_integrity(self) -> None:
        """For tests, on a store at rest: AssertionError unless every key keeps the rules of `common.lua`."""
        found = await violations(self._redis, self._settings.max_attempts)
        if found:
            raise AssertionError("; ".join(found))

    async def _settle(self, claim: Claim, outcome: str, **fields: str | bytes | int) -> Mapping[str, Tier] | None:
        """Where the text encoded ahead came from; None where the same settlement was made before."""
        attempts = self._settings.max_attempts
        answer = await self._run("settle", claim.job_id, claim.fence, outcome, attempts, *_flat(fields))
        if _held(claim, answer) == b"again":
            return None
        return records.TIERS.validate_json(answer) if answer else {}

    async def _renew_all(self, renewals: Sequence[tuple[Claim, int]]) -> Sequence[bytes]:
        flat = [part for claim, step in renewals for part in (claim.job_id, claim.fence, step)]
        answers: list[bytes] = await self._run("renew", milliseconds(self._settings.lease_s), *flat)
        return answers


def _flat(fields: Fields) -> list[str | bytes | int]:
    return [part for field in fields.items() for part in field]


def _held(claim: Claim, answer: bytes) -> bytes:
    """A script's answer, LeaseLost where the claim is over."""
    if answer == b"lost":
        raise LeaseLost(f"job {claim.job_id} is no longer held by this worker")
    return answer


def _checked(job_id: str) -> str:
    """Ids become parts of keys; one of another shape was never given."""
    if not _ID.fullmatch(job_id):
        raise _unknown()
    return job_id


def _found(job_id: str, snapshot: Sequence[Any]) -> Job:
    job = records.job(job_id, snapshot)
    if job is None:
        raise _unknown()
    return job


def _unknown() -> JobNotFound:
    return JobNotFound("there is no such job, or its record's time is over", "id")
