"""The workers' side of the job store: claims, signs of life, settlements."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from pydantic import ValidationError

from serve.domain.jobs import ImageRef, JobError, JobState, MemoryReport, Preview, Timings
from serve.domain.text import Tier
from serve.errors import BackendUnavailable, LeaseLost
from serve.jobs import reading, records, scripts
from serve.jobs.base import Fields, Shared, flat
from serve.jobs.bell import CANCEL
from serve.jobs.connection import milliseconds
from serve.jobs.records import Claim, Marks, Want, outdone, step_of, steps_of
from serve.jobs.renewals import Renewals
from serve.jobs.schema import SCHEMA, Schema
from serve.jobs.terms import Hold
from serve.settings.stores import JobSettings
from serve.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

UNREADABLE = JobError(code="unreadable", message="the server can't read the order that it was given")


class Claims(Shared):
    """Every method may raise BackendUnavailable.

    Owns: the renewals on their way, and the numbers of claims whose answer may have been lost.
    """

    def __init__(
        self, settings: JobSettings, metrics: Metrics, folder: Path = scripts.FOLDER, schema: Schema = SCHEMA
    ) -> None:
        super().__init__(settings, metrics, folder, schema)
        self._renewals = Renewals(self._renew_all)
        self._unanswered: dict[str, str] = {}

    async def claim(
        self, worker: str, wants: Sequence[Want], *, idle: bool = True, free: int = 1, marks: Marks = Marks()
    ) -> Claim | Hold | None:
        """Lease a queued job that satisfies the first want which any queued job satisfies; None where none is queued,
        Hold.UNFIT where none satisfies any, Hold.ALONE where that whose turn it is waits until this worker is `idle`.

        So a later want is only served where nothing queued satisfies an earlier one. Of the jobs that satisfy it, the
        owners take turns by weight and predicted cost, and an owner's `interactive` jobs go before the `batch` ones,
        the oldest first. `waited_s` counts from when a job last joined the queue, which a retry and a release do again.
        Jobs whose time is over, or not come yet, are passed over. It is one step of Redis and one pass over the queue.
        A job of a later schema than this release reads is for workers of the release that wrote it. A job that `fail`
        has marked with an amount of memory is for workers with clearly more; after a time that `marks` says for this
        one too.

        A worker that is left with nothing to claim stands by from the same moment: it is told (`wait_for_work`) of a
        job that is queued later, unless better placed ones are. `free` images fit beside those that it holds: with more
        it is better placed.
        """
        flat: list[str | int] = [marks.alive, marks.coming, _patience(marks.coming_s), _patience(marks.rest_s), free]
        for want in wants:
            flat += want.model, want.above, want.upto, round(want.waited_s * 1000), outdone(want.memory_mb)
        lease, timeout = milliseconds(self._settings.lease_s), milliseconds(self._settings.timeout_s)
        number = self._unanswered.pop(worker, None) or uuid.uuid4().hex
        asked_at = time.monotonic()
        try:
            reply = await self._run("claim", worker, number, lease, timeout, int(idle), self._schema.newest, *flat)
        except BackendUnavailable:
            self._unanswered[worker] = number  # it may have been given a job
            raise
        if isinstance(reply, bytes):
            return Hold(reply.decode())
        if reply is None:
            return None
        try:
            return records.claim(reply, asked_at)
        except ValidationError as error:
            await self._put_back(reply[0], reply[2], error)
            return Hold.UNFIT

    async def renew(self, claim: Claim, step: int = 0, state: JobState = JobState.RUNNING) -> bool:
        """Renew the lease and tell the progress: `step` counts denoising steps done, `state` is one of those that a
        worker holds. Neither goes back.

        False: the client cancelled the job. LeaseLost: the claim is over. Renewals made together travel together.
        """
        return _held(claim, await self._renewals.renew(claim, step, state)) == b"held"

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
        return self._bell.listening_for(CANCEL, claim.job_id, event)

    async def succeed(
        self,
        claim: Claim,
        *,
        images: Sequence[ImageRef],
        cache: Mapping[str, Tier],
        timings: Timings,
        approximate: Sequence[str] = (),
        memory: MemoryReport | None = None,
    ) -> Mapping[str, Tier]:
        """End the job with its stored images. `cache` says for each unit key where it came from, `approximate` what
        kept the images from being exact, `memory` how all attempts have fared.

        Returns the same with what the text encoded ahead has cost, so that it is counted once: nothing, where this
        settlement was made before. LeaseLost where the claim is over: the result does not count. Like every settlement
        (`fail`, `cancelled`, `release`) it may be repeated when its answer was lost.
        """
        fields: dict[str, str | bytes | int] = {
            "images": records.IMAGES.dump_json(tuple(images)),
            "cache": records.TIERS.dump_json(dict(cache)),
            "timings": records.TIMINGS.dump_json(timings, exclude_none=True),
            "approximate": records.APPROXIMATE.dump_json(tuple(approximate)),
            "step": steps_of(claim.request),
        }
        ahead = await self._settle(claim, "succeeded", fields, memory=memory)
        return {} if ahead is None else records.tiers(ahead, cache)

    async def fail(
        self,
        claim: Claim,
        error: JobError,
        *,
        retry: bool,
        delay_s: float = 0.0,
        memory: MemoryReport | None = None,
    ) -> None:
        """End the attempt. With `retry` the job waits again at its old place while attempts remain, to be claimed after
        half to one and a half times `delay_s`; without any left it failed, and is kept as a dead letter. Without
        `retry` it failed by itself. `memory` is how all attempts have fared; its `above_mb` is the mark that a claim
        goes by."""
        told = records.ERROR.dump_json(error)
        delay_ms = round(1000 * delay_s * random.uniform(0.5, 1.5))
        await self._settle(claim, "retry" if retry else "failed", {"error": told}, delay_ms, memory)

    async def cancelled(self, claim: Claim) -> None:
        """The worker stopped because the client no longer wants the job."""
        await self._settle(claim, "cancelled")

    async def release(self, claim: Claim) -> None:
        """Give an unfinished job back to its old place in the queue; the attempt does not count."""
        await self._settle(claim, "release")

    async def wait_for_work(self, worker: str, timeout_s: float) -> None:
        """Return when a job was queued for which this worker was chosen, of all whose last claim left them nothing, at
        the latest after `timeout_s`. May return early, never raises."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                rung = await self._bell.work(worker)
                await rung.wait()
                rung.clear()

    async def stand_by_no_more(self, worker: str, model: str) -> None:
        """For one that will not claim again."""
        await self._connection.guarded(self._redis.zrem(f"tandem:standby:{model}", worker))

    async def _put_back(self, job_id: bytes, fence: int, error: ValidationError) -> None:
        """What no worker can read costs none its lease: others may try, until the attempts are used up."""
        places = ", ".join(".".join(map(str, each["loc"])) for each in error.errors(include_url=False))
        log.error("the order of job %s can't be read (%s)", job_id.decode(), places or "no JSON")
        delay_ms, told = milliseconds(self._settings.retry_backoff_s), records.ERROR.dump_json(UNREADABLE)
        await self._run("settle", job_id, fence, "retry", delay_ms, "", "", "error", told)

    async def _settle(
        self,
        claim: Claim,
        outcome: str,
        fields: Fields | None = None,
        delay_ms: int = 0,
        memory: MemoryReport | None = None,
    ) -> Mapping[str, Tier] | None:
        """Where the text encoded ahead came from; None where the same settlement was made before."""
        mark = "" if memory is None or memory.above_mb is None else memory.above_mb
        told = b"" if memory is None else records.MEMORY.dump_json(memory)
        settlement = claim.job_id, claim.fence, outcome, delay_ms, mark, told
        answer = await self._run("settle", *settlement, *flat(fields or {}))
        if _held(claim, answer) == b"again":
            return None
        return reading.beside(records.TIERS, answer, {})

    async def _renew_all(self, renewals: Sequence[tuple[Claim, int, JobState]]) -> Sequence[bytes]:
        flat = [part for claim, step, state in renewals for part in (claim.job_id, claim.fence, step, state)]
        answers: list[bytes] = await self._run("renew", milliseconds(self._settings.lease_s), *flat)
        return answers


def _patience(seconds: float | None) -> int:
    """In milliseconds; -1 is for ever."""
    return -1 if seconds is None else milliseconds(seconds)


def _held(claim: Claim, answer: bytes) -> bytes:
    """A script's answer, LeaseLost where the claim is over."""
    if answer == b"lost":
        raise LeaseLost(f"job {claim.job_id} is no longer held by this worker")
    return answer
