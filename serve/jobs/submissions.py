"""The clients' side of the job store: orders, questions, cancellations."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from serve.callers import Allowance, Limit
from serve.domain.jobs import Job, JobEvent, JobState
from serve.domain.orders import ImageRequest
from serve.domain.text import Note, Tier, TokenCount, Truncation
from serve.errors import Conflict, InvalidRequest, JobGone, QueueFull, RateLimited
from serve.jobs import reading, records
from serve.jobs.admission import queue_full
from serve.jobs.base import ID, Shared, checked, flat, unknown
from serve.jobs.bell import ENDED
from serve.jobs.connection import milliseconds
from serve.jobs.records import steps_of
from serve.jobs.terms import Crew, JobPage, Submitted, Terms

_OWN_JOB_S = 2.0
"""When to ask again for whom only one of their own jobs keeps out."""
EVENTS_PAGE = 200
"""Most entries of a stream in one answer: where there are fewer, there were no more."""
_LOOKED_AT = 1000
_DAY_S, _MINUTE_S = 86400, 60
_EVENT_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")


class Submissions(Shared):
    """Every method may raise BackendUnavailable."""

    async def submit(
        self,
        job_id: str,
        request: ImageRequest,
        truncated: Sequence[Truncation] = (),
        *,
        tokens: Sequence[TokenCount] = (),
        notes: Sequence[Note] = (),
        terms: Terms = Terms(),
    ) -> Submitted:
        """Log a job durably and queue it. The same call again is the same job. `truncated`, `tokens` and `notes` are
        what there is to say of its text.

        With a `fingerprint` the order is known for a while under its name: its owner's key, or the id. The same order
        under that name is the same job, whatever id it comes with. Raises QueueFull and RateLimited; Conflict where the
        name stands for another order, JobGone where the record of this one is deleted; JobNotFound where the id is
        another owner's. Then nothing was logged.
        """
        if not ID.fullmatch(job_id):
            raise ValueError("a job id is 1 to 64 letters, digits, hyphens and underscores")
        fields: dict[str, str | bytes | int] = {
            "request": reading.REQUEST.dump_json(request),
            "truncated": records.TRUNCATED.dump_json(tuple(truncated)),
            "schema": self._schema.of(request),
            "model": request.model,
            "pixels": request.pixels,
            "rows": request.num_images,
            "steps": steps_of(request),
            "weight": repr(terms.weight),
            "priority": terms.priority,
            "cost": max(1, terms.cost_ms),
            "alone": terms.alone_ms,
            "token": uuid.uuid4().hex,
        }
        if tokens:
            fields["tokens"] = records.TOKENS.dump_json(tuple(tokens))
        if notes:
            fields["notes"] = records.NOTES.dump_json(tuple(notes))
        if request.template is not None:
            fields |= {"template": request.template, "arm": request.arm or ""}
        if terms.webhook is not None:
            fields["webhook"] = terms.webhook
        if terms.arrival is not None and terms.arrival.trace is not None:
            fields["trace"] = terms.arrival.trace
        crew = await self.crew(request.model)
        replicas = max(len(crew.reports), terms.replicas, 1)
        if terms.arrival is not None:  # last, so that the way to the store alone is not in it
            fields["admission"] = _ms(time.monotonic() - terms.arrival.at)
        status, *answer = await self._run(
            "submit",
            job_id,
            terms.owner,
            terms.fingerprint or "",
            _name(terms.owner, terms.key, job_id),
            milliseconds(self._settings.idempotency_ttl_s),
            self._settings.max_queued,
            milliseconds(self._settings.max_queued_s * replicas),
            milliseconds(self._settings.queue_ttl_s),
            *_bounds(terms.allowance),
            *flat(fields),
        )
        if status in (b"full", b"limited"):
            raise self._not_now(status, answer, crew)
        if status in (b"taken", b"conflict", b"gone"):
            raise _refusal(status)
        found, snapshot, limits = answer
        job = await self._found(found.decode(), snapshot)
        return Submitted(job=job, replayed=status == b"again", limits=_limits(limits))

    async def admit(self, model: str, cost_ms: int, owner: str, allowance: Allowance) -> None:
        """QueueFull or RateLimited where an order of that cost would be refused now. Nothing is charged or reserved."""
        crew = await self.crew(model)
        most_ms = milliseconds(self._settings.max_queued_s * max(len(crew.reports), 1))
        bounds = (self._settings.max_queued, most_ms, *_bounds(allowance))
        status, *answer = await self._run("admit", owner, model, max(1, cost_ms), *bounds)
        if status != b"admitted":
            raise self._not_now(status, answer, crew)

    def _not_now(self, status: bytes, answer: Sequence[Any], crew: Crew) -> QueueFull | RateLimited:
        if status == b"full":
            waiting_ms, over_ms = answer
            return queue_full(waiting_ms, over_ms, crew, self._settings)
        name, wait_ms, limits = answer
        return _limited(name.decode(), wait_ms, _limits(limits))

    async def peek(self, owner: str, fingerprint: str, *, key: str | None = None, job_id: str = "") -> Job | None:
        """The job that a submission under the owner's `key`, or under an id, would be answered with; None where it
        would be a new one. Raises Conflict, JobGone, JobNotFound as `submit`."""
        status, *answer = await self._run("peek", _name(owner, key, job_id), job_id, owner, fingerprint)
        if status == b"new":
            return None
        if status != b"again":
            raise _refusal(status)
        found, snapshot = answer
        return await self._found(found.decode(), snapshot)

    async def limits(self, owner: str, allowance: Allowance) -> tuple[Limit, ...]:
        """The owner's limits as they stand; nothing is charged."""
        return _limits(await self._run("limits", owner, *_bounds(allowance))) if allowance != Allowance() else ()

    async def get(self, job_id: str, owner: str | None = None) -> Job:
        """JobNotFound for an id that was never given, once the record's time is over, and for a job that is not
        `owner`'s (None: whoever's)."""
        job = await self._found(job_id, await self._run("get", checked(job_id)))
        if owner is not None and job.owner != owner:
            raise unknown()
        return job

    async def jobs(
        self,
        owner: str | None = None,
        *,
        states: Sequence[JobState] = (),
        dead: bool = False,
        after: str | None = None,
        count: int = 50,
    ) -> JobPage:
        """A page of jobs, newest first: of an owner (None: of all), in these states (none: in any), with `dead` those
        of nobody's fault that failed; behind the cursor `after`. Their place and ETA are not told.

        A page may hold fewer although it goes on. Raises InvalidRequest for an `after` that is no cursor.
        """
        if after is not None and not re.fullmatch(r"[0-9]{1,15}", after):
            raise InvalidRequest("cursor: send what the page before called next", "cursor")
        index = "tandem:dead" if dead else "tandem:records" if owner is None else f"tandem:owner:{owner}"
        ids, found, rest = await self._run("list", index, after or "+inf", count, _LOOKED_AT, *states)
        jobs = [self._read(each.decode(), (record, False)) for each, record in zip(ids, found, strict=True)]
        mine = tuple(job for job in jobs if job is not None and owner in (None, job.owner))
        return JobPage(jobs=mine, next=rest.decode() or None)

    async def cancel(self, job_id: str, owner: str | None = None) -> Job:
        """A queued job ends at once, one that a worker holds when that hears of it, an ended one stays what it is.
        JobNotFound for a job that is not `owner`'s (None: whoever's)."""
        whose = (0, "") if owner is None else (1, owner)
        return await self._found(job_id, await self._run("cancel", checked(job_id), *whose))

    async def note_ahead(self, job_id: str, units: Mapping[str, Tier], took_s: float = 0.0) -> None:
        """Tell where each text unit came from when the text was encoded while the job waits, and how long that took."""
        await self._run("ahead", checked(job_id), records.TIERS.dump_json(dict(units)), _ms(took_s))

    async def events_after(
        self, job_id: str, after: str | None, previews: bool = True, *, tell: bool = False
    ) -> tuple[list[JobEvent], bool]:
        """The next entries of the job's stream, at most a page, and whether the job had ended by then. Without
        `previews` their files stay in Redis, and the events that tell of them have an `index` alone. `tell` is said of
        what a client follows: the record keeps when the end was first told."""
        if after is not None and not _EVENT_ID.fullmatch(after):
            raise InvalidRequest("the id of the last event has the form 1700000000000-0", "after")
        start = "-" if after is None else f"({after}"
        state, entries, files = await self._reading.run(
            "events", checked(job_id), start, EVENTS_PAGE, int(previews), int(tell)
        )
        if state is None:
            raise unknown()
        events = [records.event(entry, file) for entry, file in zip(entries, files, strict=True)]
        return events, JobState(state.decode()).terminal

    async def ended(self, job_id: str) -> Job | None:
        """The job once it has ended, None before: for a client that waits, who is told of the end with this."""
        snapshot = await self._reading.run("ended", checked(job_id))
        return await self._found(job_id, snapshot) if snapshot != [[], 1] else None

    def changes(self, job_id: str) -> AbstractAsyncContextManager[asyncio.Event]:
        """An event that is set when the job's stream grew; it may be set without reason."""
        return self._bell.listening(f"tandem:events:{checked(job_id)}")

    def ends(self, job_id: str) -> AbstractAsyncContextManager[asyncio.Event]:
        """An event that is set when the job ends, or has in the last seconds; it may be set without reason."""
        return self._bell.listening_for(ENDED, checked(job_id))


def _ms(seconds: float) -> str:
    """To the microsecond: what it measures may be shorter than a millisecond."""
    return f"{1000 * seconds:.3f}"


def _bounds(allowance: Allowance) -> tuple[int, int, int]:
    """As the scripts want them: -1 for no bound, work in milliseconds."""
    engine_ms = None if allowance.engine_s_per_day is None else round(allowance.engine_s_per_day * 1000)
    requests, engine, unfinished = (
        -1 if bound is None else bound for bound in (allowance.requests_per_minute, engine_ms, allowance.max_unfinished)
    )
    return requests, engine, unfinished


def _name(owner: str, key: str | None, job_id: str) -> str:
    """Under which an order is known. A key is its owner's alone, and nothing that a client wrote enters a name."""
    if key is None:
        return f"id:{job_id}"
    return f"key:{hashlib.blake2b(f'{len(owner)}:{owner}{key}'.encode(), digest_size=16).hexdigest()}"


def _refusal(status: bytes) -> Exception:
    if status == b"conflict":
        return Conflict("this id or key stands for another order already", "id")
    if status == b"gone":
        return JobGone("this order was served before, and its record's time is over", "id")
    return unknown()


def _limited(name: str, wait_ms: int, limits: tuple[Limit, ...]) -> RateLimited:
    bound = next(each for each in limits if each.name == name)
    told = {
        "requests_per_minute": f"orders a minute: {bound.limit} at most",
        "engine_s_per_day": f"predicted seconds of a replica a day: {bound.limit} at most",
        "max_unfinished": f"jobs that have not ended: {bound.limit} at most",
    }[name]
    wait_s = wait_ms / 1000 or _OWN_JOB_S
    return RateLimited(f"{told} ({name})", None, wait_s, limits)


def _limits(flat: Sequence[Sequence[Any]]) -> tuple[Limit, ...]:
    """As submit.lua tells them: milliseconds of work are seconds here."""
    windows = {"requests_per_minute": _MINUTE_S, "engine_s_per_day": _DAY_S}
    limits = []
    for name, size, left, reset_ms in flat:
        field, unit = name.decode(), 1000 if name == b"engine_s_per_day" else 1
        limits.append(
            Limit(
                name=field,
                limit=size // unit,
                remaining=left // unit,
                reset_s=reset_ms / 1000,
                window_s=windows.get(field),
            )
        )
    return tuple(limits)
