"""Jobs in Redis: what was accepted is never lost, and ends once. Every transition is one script in `scripts/`.

The store needs one Redis (6.2 or later) with `noeviction` and an append-only file, or its replicated equivalent; not
Redis Cluster, because a claim chooses among jobs that would lie on different shards.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from serve.domain import ImageRef, ImageRequest, Job, JobError, JobEvent, JobState, Tier, Timings, Truncation
from serve.errors import BackendUnavailable, InvalidRequest, JobNotFound, LeaseLost, QueueFull
from serve.jobs import records, scripts
from serve.jobs.bell import Bell
from serve.jobs.integrity import violations
from serve.jobs.records import Claim
from serve.jobs.renewals import Renewals
from serve.settings import JobSettings
from serve.telemetry.metrics import Metrics

__all__ = ["Claim", "JobStore"]

log = logging.getLogger(__name__)

WORKER_LOST = JobError(code="worker_lost", message="the worker died or was cut off, in every attempt")
TIMED_OUT = JobError(code="timed_out", message="the job was not finished in time")

T = TypeVar("T")
Fields = Mapping[str, str | bytes | int]

_CONNECT_S, _ANSWER_S = 2.0, 5.0
_RETRY_AFTER_S, _LONGEST_RETRY_AFTER_S = 2.0, 60.0
_REAP_PAGE, _EVENTS_PAGE = 100, 200
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_EVENT_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")
_SCRIPTS = ("submit", "get", "events", "claim", "renew", "settle", "cancel", "ahead", "reap")


class JobStore:
    """The jobs, as every process of the server sees them. Every method may raise BackendUnavailable.

    Owns: this process's connections to the job Redis, and its bell.
    """

    def __init__(self, settings: JobSettings, metrics: Metrics) -> None:
        if settings.redis_url is None:
            raise ValueError("settings.redis_url must be filled in by now")
        self._settings = settings
        self._metrics = metrics
        self._ttl_ms = _milliseconds(settings.result_ttl_s)
        self._redis: Redis = Redis.from_pool(
            # A bounded pool makes a crowd wait for a connection instead of opening one each. A broken connection is
            # replaced once, because a restart of Redis breaks them all; when only the answer was lost, the script
            # runs twice, and each is written to bear that (a second claim's first lease lapses).
            BlockingConnectionPool.from_url(
                settings.redis_url.get_secret_value(),
                max_connections=64,
                timeout=_ANSWER_S,
                socket_timeout=_ANSWER_S,
                socket_connect_timeout=_CONNECT_S,
                protocol=2,
                retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
            )
        )
        self._scripts = {name: self._redis.register_script(scripts.source(name)) for name in _SCRIPTS}
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
            "steps": request.num_inference_steps,
        }
        timeout_ms = _milliseconds(self._settings.timeout_s)
        status, answer = await self._run("submit", job_id, self._settings.max_queued, timeout_ms, *_flat(fields))
        if status == b"full":
            wait_s = min(max(answer / 1000, 1.0), _LONGEST_RETRY_AFTER_S)
            raise QueueFull(f"{self._settings.max_queued} jobs are waiting already", retry_after_s=wait_s)
        return _found(job_id, answer)

    async def get(self, job_id: str) -> Job:
        """JobNotFound for an id that was never given, and once the record's time to live is over."""
        return _found(job_id, await self._run("get", _checked(job_id)))

    async def claim(self, worker: str, models: Sequence[str]) -> Claim | None:
        """Lease the job that was submitted first among those for `models`; None when none waits."""
        reply = await self._run("claim", worker, _milliseconds(self._settings.lease_s), *models)
        return None if reply is None else records.claim(reply)

    async def renew(self, claim: Claim, step: int = 0) -> bool:
        """Renew the lease and tell the progress; `step` counts denoising steps done and never goes back.

        False: the client cancelled the job. LeaseLost: the claim is over. Renewals made together travel together.
        """
        answer = await self._renewals.renew(claim, step)
        if answer == b"lost":
            raise LeaseLost(f"job {claim.job_id} is no longer held by this worker")
        return answer == b"held"

    async def succeed(
        self, claim: Claim, *, images: Sequence[ImageRef], cache: Mapping[str, Tier], timings: Timings
    ) -> Mapping[str, Tier]:
        """End the job with its stored images. `cache` says for each unit key where it came from.

        Returns the same with what the text encoded ahead has cost, so that it is counted once: nothing, where this
        settlement was made before. LeaseLost where the claim is over: the result does not count. Like every settlement
        (`fail`, `cancelled`, `release`) it may be repeated when its answer was lost.
        """
        fields: Fields = {
            "images": records.IMAGES.dump_json(tuple(images)),
            "cache": records.TIERS.dump_json(dict(cache)),
            "timings": records.TIMINGS.dump_json(timings),
            "step": claim.request.num_inference_steps,
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

    async def events_after(self, job_id: str, after: str | None) -> tuple[list[JobEvent], bool]:
        """The next entries of the job's stream, at most a page, and whether the job had ended by then."""
        if after is not None and not _EVENT_ID.fullmatch(after):
            raise InvalidRequest("the id of the last event has the form 1700000000000-0", "after")
        start = "-" if after is None else f"({after}"
        state, entries = await self._run("events", _checked(job_id), start, _EVENTS_PAGE)
        if state is None:
            raise _unknown()
        return [records.event(entry) for entry in entries], JobState(state.decode()).terminal

    def changes(self, job_id: str) -> AbstractAsyncContextManager[asyncio.Event]:
        """An event that is set when the job's stream grew; it may be set without reason."""
        return self._bell.listening(f"tandem:events:{_checked(job_id)}")

    async def queue_depth(self) -> int:
        """How many jobs wait."""
        depth: int = await self._guarded(self._redis.zcard("tandem:queue"))
        self._metrics.set("tandem_queue_depth", depth)
        return depth

    async def ping(self) -> None:
        """BackendUnavailable unless the store answers."""
        await self._guarded(self._redis.ping())

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
        if answer == b"lost":
            raise LeaseLost(f"job {claim.job_id} is no longer held by this worker")
        if answer == b"again":
            return None
        return records.TIERS.validate_json(answer) if answer else {}

    async def _renew_all(self, renewals: Sequence[tuple[Claim, int]]) -> Sequence[bytes]:
        flat = [part for claim, step in renewals for part in (claim.job_id, claim.fence, step)]
        answers: list[bytes] = await self._run("renew", _milliseconds(self._settings.lease_s), *flat)
        return answers

    async def _run(self, name: str, *args: str | bytes | int) -> Any:
        """Run a script: one round trip. What it ended is counted here, where each transition passes once."""
        ended, answer = await self._guarded(self._scripts[name](args=(self._ttl_ms, *args)))
        for state, age_ms in ended:
            self._metrics.inc("tandem_jobs_total", state=state.decode())
            self._metrics.observe("tandem_job_seconds", age_ms / 1000)
        return answer

    async def _guarded(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except (RedisError, OSError) as error:
            log.warning("the job store does not answer: %s", error)
        raise BackendUnavailable("the job store does not answer", "jobs.redis_url", _RETRY_AFTER_S)


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _flat(fields: Fields) -> list[str | bytes | int]:
    return [part for field in fields.items() for part in field]


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
