"""The loop that makes the calls which are due. Any number of processes may run it."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx
from standardwebhooks import Webhook

from serve import __version__
from serve.domain.jobs import Job
from serve.errors import ClientError, InvalidRequest, TandemError, Unavailable
from serve.jobs.store import JobStore
from serve.settings.front import WebhookSettings
from serve.telemetry.metrics import Metrics
from serve.webhooks.addresses import checked
from serve.webhooks.calls import Caller, Resolve
from serve.webhooks.turns import CALLS, IN_HAND, Crowded, Turns

log = logging.getLogger(__name__)

_LARGEST_BODY = 1024 * 1024
_GONE = 410


class Outcome(enum.StrEnum):
    """Of one call, as `tandem_webhooks_total` counts it."""

    DELIVERED = "delivered"
    RETRIED = "retried"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds. `first_retry_s` doubles with every call up to `longest_retry_s`, each half to one and a half times as
    long by chance; `turn_s` is how long a call waits here for others to its host, `later_s` when one that found no
    place is looked at again at the earliest; `store_s` is how long the store may take to note what came of it;
    `look_again_s` is when to look for what is due, without a ring of the store's."""

    first_retry_s: float = 10.0
    longest_retry_s: float = 900.0
    turn_s: float = 5.0
    later_s: float = 5.0
    store_s: float = 15.0
    look_again_s: float = 2.0


class Deliverer:
    """Tells the ends of jobs to the addresses that their orders named, each until it was heard or given up.

    A call is made at least once: a process that dies before it could note the answer leaves the job to the next one. So
    every call about a job has the same `webhook-id`.

    A host gets few calls at a time, and few wait here for their turn, so that a slow one does not hold the others. What
    finds no place, or waits too long, is put off by some seconds: no call was made, and none counts.

    Owns: its calls under way.
    """

    def __init__(
        self,
        store: JobStore,
        settings: WebhookSettings,
        body: Callable[[Job], bytes],
        metrics: Metrics,
        *,
        resolve: Resolve | None = None,
        pace: Pace = Pace(),
    ) -> None:
        """`body` writes what is told of a job, JSON in UTF-8."""
        self._store = store
        self._settings = settings
        self._body = body
        self._metrics = metrics
        self._pace = pace
        self._signer = Webhook(settings.secret.get_secret_value()) if settings.secret else None
        self._caller = Caller(settings, CALLS, resolve)
        self._turns = Turns(pace.turn_s, pace.later_s)
        self._tasks: set[asyncio.Task[None]] = set()
        self._lease_s = pace.turn_s + settings.timeout_s + pace.store_s

    async def run(self) -> None:
        """Make the calls until cancelled."""
        try:
            async with self._store.webhooks_changed() as changed:
                while True:
                    changed.clear()
                    if await self._take():
                        continue
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._pace.look_again_s):
                            await changed.wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._caller.close()

    async def _take(self) -> bool:
        """Begin what is due, as far as it can be held. Whether there may be more."""
        if len(self._tasks) >= IN_HAND:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        room = IN_HAND - len(self._tasks)
        try:
            due = await self._store.due_webhooks(self._lease_s, room)
        except TandemError as error:
            log.warning("looking for webhooks: %s", error.message)
            return False
        for job_id in due:
            task = asyncio.create_task(self._tell(job_id))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return len(due) == room

    async def _tell(self, job_id: str) -> None:
        try:
            outcome = await self._attempt(job_id)
            if outcome is not None:
                self._metrics.inc("tandem_webhooks_total", outcome=outcome)
        except TandemError as error:
            # Its lease runs out, and it is due again.
            log.warning("the webhook of job %s: %s", job_id, error.message)

    async def _attempt(self, job_id: str) -> Outcome | None:
        """One call, and what came of it noted; None where none was to be made, or not now. BackendUnavailable."""
        calls = 0
        try:
            job = await self._store.get(job_id)
            url = checked(job.webhook or "", self._settings)
            async with self._turns.at(url.raw_host.decode("ascii")):
                calls = await self._store.webhook_called(job_id, self._lease_s)
                if not calls:  # another process has ended the matter, or the record is deleted
                    return None
                outcome = await self._call(job, url)
        except Crowded as crowd:
            await self._store.webhook_again(job_id, crowd.delay_s)
            return None
        except ClientError as error:
            # The record's time is over, or the settings no longer allow the address.
            log.warning("the webhook of job %s is given up: %s", job_id, error.message)
            outcome = Outcome.FAILED
        except Unavailable:
            raise
        except Exception:
            log.exception("the webhook of job %s", job_id)
            # What can't even be read or written counts, so that it is given up in the end.
            calls = calls or await self._store.webhook_called(job_id, self._lease_s)
            if not calls:
                return None
            outcome = Outcome.RETRIED
        return await self._note(job_id, outcome, calls)

    async def _call(self, job: Job, url: httpx.URL) -> Outcome:
        """RETRIED unless it has settled the matter. InvalidRequest where there is too much to tell."""
        body = self._body(job)
        if len(body) > _LARGEST_BODY:
            raise InvalidRequest(f"there are {len(body)} bytes to tell", "webhook")
        return _outcome(await self._caller.post(url, self._headers(job.id, body), body))

    async def _note(self, job_id: str, outcome: Outcome, calls: int) -> Outcome:
        """`calls` counts this one. FAILED where it was the last."""
        if outcome is Outcome.RETRIED and calls < self._settings.max_attempts:
            delay_s = min(self._pace.first_retry_s * 2.0 ** min(calls - 1, 32), self._pace.longest_retry_s)
            await self._store.webhook_again(job_id, delay_s * random.uniform(0.5, 1.5))
            return outcome
        if outcome is Outcome.RETRIED:
            log.warning("the webhook of job %s is given up: no call was answered with a 2xx", job_id)
            outcome = Outcome.FAILED
        await self._store.webhook_done(job_id, outcome is Outcome.DELIVERED)
        return outcome

    def _headers(self, job_id: str, body: bytes) -> dict[str, str]:
        assert self._signer is not None, "without allowed hosts nothing is called"
        now = datetime.now(UTC)
        return {
            "content-type": "application/json",
            "user-agent": f"Tandem/{__version__}",
            "webhook-id": job_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self._signer.sign(job_id, now, body.decode()),
        }


def _outcome(status: int | None) -> Outcome:
    """Of one call's answer. 410 is the receiver's word that nobody listens there any more."""
    if status is not None and 200 <= status < 300:
        return Outcome.DELIVERED
    return Outcome.FAILED if status == _GONE else Outcome.RETRIED
