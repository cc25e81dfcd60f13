"""The upkeep of the job store: what time ends, what nobody may ask for any more, who is still to be told."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager

from redis.exceptions import ResponseError

from serve.domain.jobs import JobError
from serve.errors import BackendUnavailable
from serve.jobs import records
from serve.jobs.base import Shared, checked
from serve.jobs.connection import milliseconds
from serve.jobs.terms import Memory
from serve.settings.stores import JobSettings

WORKER_LOST = JobError(code="worker_lost", message="the worker died or was cut off, in every attempt")
TIMED_OUT = JobError(code="timed_out", message="the job was not finished in time")
NEVER_STARTED = JobError(code="queue_timeout", message="no worker was free in time")

RULES = "tandem:rules"
_PAGE = 100


class Upkeep(Shared):
    """Every method may raise BackendUnavailable. Any number of processes may do it at once."""

    async def reap(self) -> int:
        """Give the jobs of lapsed leases back or fail them, and expire those past their time. Returns how many."""
        told = [records.ERROR.dump_json(error) for error in (WORKER_LOST, TIMED_OUT, NEVER_STARTED)]
        total = 0
        while True:
            reaped: int = await self._run("reap", _PAGE, *told)
            total += reaped
            if reaped < _PAGE:
                return total

    async def doubts(self) -> tuple[str, ...]:
        """Why a job that this Redis was given might be lost, as far as it tells; a managed one may not."""
        wanted = {"appendonly": "yes", "maxmemory-policy": "noeviction"}
        found: dict[str | None, str | None] = {}
        try:
            for name in wanted:  # one by one: Redis 6 knows no more at a time
                found |= await self._connection.guarded(self._redis.config_get(name))
        except BackendUnavailable:
            return ()
        others = {name: found[name] for name, value in wanted.items() if found.get(name, value) != value}
        return tuple(f"{name} is {value}, not {wanted[name]}" for name, value in others.items())

    async def memory(self) -> Memory | None:
        """How full the store is; None where this Redis does not say: a managed one may forbid it."""

        async def asked() -> Mapping[str, int]:
            with contextlib.suppress(ResponseError):
                found: Mapping[str, int] = await self._redis.info("memory")
                return found
            return {}

        found = await self._connection.guarded(asked())
        if not found.keys() >= {"used_memory", "maxmemory"}:
            return None
        # The buffers of its file and of replicas don't count: Redis says how much that is.
        used = found["used_memory"] - found.get("mem_not_counted_for_evict", 0)
        return Memory(used=used, limit=found["maxmemory"])

    async def tell_rules(self) -> None:
        """Leave the settings of jobs where the operator's commands find them (`told_rules`)."""
        told = self._settings.model_dump_json(exclude={"redis_url"})
        await self._connection.guarded(self._redis.set(RULES, told))

    async def told_rules(self) -> JobSettings:
        """Those that a server has left there, else this store's own."""
        told = await self._connection.guarded(self._redis.get(RULES))
        if told is None:
            return self._settings
        try:
            written = json.loads(told)
            known = {name: written[name] for name in JobSettings.model_fields.keys() & written.keys()}
            return JobSettings.model_validate(known | {"redis_url": self._settings.redis_url})
        except ValueError:
            return self._settings  # another release's, of another form

    async def overdue(self, count: int = _PAGE) -> list[str]:
        """Ended jobs whose record's time is over, the oldest first. Once nothing else is left of them: `forget`."""
        return [job_id.decode() for job_id in await self._run("overdue", count)]

    async def forget(self, job_ids: Sequence[str]) -> int:
        """Delete the records of those that are overdue; how many there were."""
        return int(await self._run("forget", 0, *job_ids)) if job_ids else 0

    async def put_off(self, job_ids: Sequence[str], delay_s: float) -> int:
        """Keep those of them that are overdue for so much longer; how many there were."""
        return int(await self._run("forget", milliseconds(delay_s), *job_ids)) if job_ids else 0

    async def due_webhooks(self, lease_s: float, count: int = 10) -> list[str]:
        """Ended jobs whose webhook is to be called now; nobody else is given them within `lease_s`."""
        return [job_id.decode() for job_id in await self._run("webhook", "due", milliseconds(lease_s), count)]

    async def webhook_called(self, job_id: str, lease_s: float) -> int:
        """A call is made now: the how manieth, 0 where none is to be made any more. Nobody else is given the job within
        `lease_s`."""
        return int(await self._run("webhook", "call", checked(job_id), milliseconds(lease_s)))

    async def webhook_done(self, job_id: str, delivered: bool) -> None:
        """The end was told, or that was given up."""
        await self._run("webhook", "done", checked(job_id), "delivered" if delivered else "failed")

    async def webhook_again(self, job_id: str, delay_s: float) -> int:
        """Call again after `delay_s`; how many calls there were, 0 where none is to be made any more."""
        return int(await self._run("webhook", "again", checked(job_id), milliseconds(delay_s)))

    def webhooks_changed(self) -> AbstractAsyncContextManager[asyncio.Event]:
        """An event that is set when a webhook is to be called; it may be set without reason."""
        return self._bell.listening("tandem:webhooks")
