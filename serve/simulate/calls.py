"""What replicas and orders do to a job store, as its scripts are called."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

from serve.domain.orders import ImageRequest
from serve.jobs.connection import milliseconds
from serve.jobs.records import Want, outdone, steps_of
from serve.jobs.schema import SCHEMA
from serve.jobs.terms import Hold
from serve.settings.stores import JobSettings

_REAPED = 1000
"""Most jobs of one sweep."""
_NEVER_MS = 10**12
"""A lease of who is sure to renew it: until `last_sign` says that nobody does."""


class StoreCalls(abc.ABC):
    """Times are milliseconds since the simulation began.

    Admission, the order of claims, fencing and retries are those of serve/jobs/scripts, which run unchanged. Not
    simulated: allowances of keys, idempotency, previews, webhooks. A record is forgotten as soon as its job has ended.
    """

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self._settings_args = ("0", "0", str(settings.max_attempts))
        self._claims = 0

    def submit(
        self,
        now_ms: float,
        job_id: str,
        request: ImageRequest,
        *,
        owner: str,
        priority: str,
        cost_ms: int,
        replicas: int,
    ) -> bool:
        """Whether it was let in."""
        own = self._settings
        fields: dict[str, Any] = {
            "request": "",
            "truncated": "",
            "model": request.model,
            "pixels": request.pixels,
            "rows": request.num_images,
            "steps": steps_of(request),
            "weight": "1.0",
            "priority": priority,
            "cost": max(1, cost_ms),
            "alone": 0,
            "token": job_id,
        }
        bounds = own.max_queued, milliseconds(own.max_queued_s * max(1, replicas)), milliseconds(own.queue_ttl_s)
        flat = (part for field in fields.items() for part in field)
        answer = self._call("submit", now_ms, job_id, owner, "", f"id:{job_id}", 0, *bounds, -1, -1, -1, *flat)
        return bool(answer[0] == "queued")

    def claim(
        self, now_ms: float, worker: str, wants: Sequence[Want], *, idle: bool
    ) -> tuple[str, int, bool] | Hold | None:
        """The job's id, its fence, and whether it was the last that was queued; else as `Claims.claim`."""
        self._claims += 1
        flat = [
            part
            for want in wants
            for part in (want.model, want.above, want.upto, round(want.waited_s * 1000), outdone(want.memory_mb))
        ]
        times = _NEVER_MS, milliseconds(self._settings.timeout_s)
        answer = self._call(
            "claim", now_ms, worker, self._claims, *times, int(idle), SCHEMA.newest, 0, 0, -1, -1, 0, *flat
        )
        if answer is None or isinstance(answer, str):
            return None if answer is None else Hold(answer)
        job_id, _, fence, _, behind, *_ = answer
        self.claimed(job_id)
        return job_id, int(fence), not behind

    def claimed(self, job_id: str) -> None:
        """A claim got this job: for a store that has to do something about it."""
        return

    def last_sign(self, now_ms: float, job_id: str, fence: int) -> None:
        """The worker of a job renews its lease, for the last time."""
        self._call("renew", now_ms, milliseconds(self._settings.lease_s), job_id, fence, 0, "encoding")

    def settle(self, now_ms: float, job_id: str, fence: int) -> bool:
        """The images are there. Whether they count: False where the claim is over."""
        if self._call("settle", now_ms, job_id, fence, "succeeded", 0, "", "") == "lost":
            return False
        self.forget(now_ms, job_id)
        return True

    def reap(self, now_ms: float) -> int:
        """Expire jobs whose time is over, and queue those again whose workers are gone. How many there were."""
        return int(self._call("reap", now_ms, _REAPED, "", "", ""))

    def forget(self, now_ms: float, job_id: str) -> None:
        """The sweep of a job's record, once it has ended."""
        self._call("forget", now_ms, 0, job_id)

    def _call(self, name: str, now_ms: float, *args: Any) -> Any:
        return self._run(name, now_ms, *map(str, args))

    @abc.abstractmethod
    def _run(self, name: str, now_ms: float, *args: str) -> Any:
        """A script's answer, second half of what it returns: text, numbers, None; of a list at least its first five."""
