"""A job's record in Redis <-> the frozen `Job`. Numbers are decimal text, times milliseconds, the rest is JSON."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from serve.domain.jobs import ImageRef, Job, JobError, JobEvent, JobState, MemoryReport, Timings, WebhookState
from serve.domain.orders import ImageRequest, Priority, Task
from serve.domain.text import CacheReport, Note, Tier, TokenCount, Truncation
from serve.jobs import reading
from serve.jobs.eta import Load, eta_s
from serve.jobs.schema import FIRST, SCHEMA
from serve.jobs.terms import Crew

TRUNCATED = TypeAdapter(tuple[Truncation, ...])
TOKENS = TypeAdapter(tuple[TokenCount, ...])
NOTES = TypeAdapter(tuple[Note, ...])
TIERS = TypeAdapter(dict[str, Tier])
TIMINGS = TypeAdapter(Timings)
IMAGES = TypeAdapter(tuple[ImageRef, ...])
APPROXIMATE = TypeAdapter(tuple[str, ...])
ERROR = TypeAdapter(JobError)
MEMORY = TypeAdapter(MemoryReport)

MORE_PERCENT = 105
"""Of a card's memory, what another one must have to count as larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A job that a worker holds until its lease lapses.

    `attempt` counts the attempts that were used, this one included. `fence` numbers the job's claims: unlike `attempt`
    it never goes back, so that a worker which released the job or lost it can't write over the next one's work.

    `retried_s` and `queued_s` are the stages before it on the store's clock, `claim_s` is how long the answer took from
    there (both clocks), and `answered_at` when it had come (`time.monotonic`). `last`: no other job was queued then.
    `trace` is what the order's trace is continued from (W3C `traceparent`), None where there is none. `memory` is how
    the attempts before have fared, where one drew something or ran out of memory.
    """

    job_id: str
    attempt: int
    fence: int
    request: ImageRequest
    truncated: tuple[Truncation, ...] = ()
    cost_ms: int = 1
    alone: bool = False
    last: bool = field(default=False, compare=False)
    trace: str | None = None
    memory: MemoryReport | None = None
    retried_s: float | None = field(default=None, compare=False)
    queued_s: float = field(default=0.0, compare=False)
    claim_s: float = field(default=0.0, compare=False)
    answered_at: float = field(default_factory=time.monotonic, compare=False)


@dataclass(frozen=True, slots=True)
class Want:
    """What a worker would take: a job for `model` whose images have more than `above` and at most `upto` pixels, and
    which no other worker took in the last `waited_s` seconds. `memory_mb` (1e6 bytes) is what the worker has of its
    card: a job is not for it that ran out of as much, within a few percent, or more. 0 where that is not known."""

    model: str
    above: int
    upto: int
    waited_s: float = 0.0
    memory_mb: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """How long a worker leaves jobs to others that are marked with as much memory as it has, by their pixels: up to
    `alive` pixels for ever, because one with more lives that draws them; up to `coming` until they have waited for
    `coming_s`; beyond both for `rest_s`. None is for ever."""

    alive: int = 0
    coming: int = 0
    coming_s: float | None = None
    rest_s: float | None = None


def outdone(memory_mb: int) -> int:
    """What clearly less memory is below: cards that are sold as the same differ by a few megabytes, and what ran out on
    one runs out on the other."""
    return -(-100 * memory_mb // MORE_PERCENT)


def steps_of(request: ImageRequest) -> int:
    """Denoising steps that each image of the job really makes: one that starts from an image skips the noisiest, as in
    diffusers (`get_timesteps` of the img2img pipelines)."""
    steps = request.num_inference_steps
    if request.task is Task.TXT2IMG or request.strength is None:
        return steps
    return max(1, min(int(steps * request.strength), steps))


def step_of(request: ImageRequest, forward: int, forwards: int) -> int:
    """The step of `steps_of` that is under way or done after so many of a run's forward passes: some samplers make
    more of these than the client asked for steps."""
    return -(-forward * steps_of(request) // forwards)


def claim(reply: Sequence[Any], asked_at: float) -> Claim:
    """`asked_at` is when the claim was sent (`time.monotonic`): its answer took no longer than since then, however far
    this machine's clock and the store's are apart. ValidationError for an order that can't be read."""
    job_id, attempt, fence, alone, behind, created, waiting, started, trace, cost, request, truncated, memory = reply
    answered_at, way_s = time.monotonic(), time.time() - int(started) / 1000
    waiting = waiting or started
    return Claim(
        job_id=job_id.decode(),
        attempt=attempt,
        fence=fence,
        request=reading.REQUEST.validate_json(request),
        truncated=reading.beside(TRUNCATED, truncated, ()),
        cost_ms=int(cost),
        alone=bool(alone),
        last=not behind,
        trace=trace.decode() if trace else None,
        memory=reading.beside(MEMORY, memory, None),
        retried_s=_after(int(created), int(waiting)) or None,
        queued_s=_after(int(waiting), int(started)),
        claim_s=min(max(0.0, way_s), answered_at - asked_at),
        answered_at=answered_at,
    )


def job(job_id: str, snapshot: Sequence[Any], crew: Crew = Crew(), newest: int = SCHEMA.newest) -> Job | None:
    """`snapshot` is the answer of `snapshot()` in common.lua, `newest` the latest schema that is read in full. None
    when there is no such job."""
    flat, standing = snapshot
    if not flat:
        return None
    fields = {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}
    created = _seconds(fields, "created")
    started, finished = _seconds(fields, "started"), _seconds(fields, "finished")
    assert created is not None
    place = standing[0] if standing else 0
    newer = int(fields.get("schema", FIRST)) > newest
    notes = reading.beside(NOTES, fields.get("notes"), ())
    return Job(
        id=job_id,
        state=JobState(fields["state"].decode()),
        request=reading.order(fields["request"], newer),
        attempt=int(fields["attempt"]),
        step=int(fields["step"]),
        steps=int(fields["steps"]),
        created_at=created,
        started_at=started,
        finished_at=finished,
        owner=fields["owner"].decode(),
        priority=Priority(fields["priority"].decode()),
        position=place or None,
        eta_s=eta_s(_load(fields), standing, crew, _start_s(fields, crew)) if standing else None,
        cost_ms=int(fields["cost"]),
        webhook=fields["webhook"].decode() if "webhook" in fields else None,
        webhook_state=WebhookState(fields["webhook_state"].decode()) if "webhook_state" in fields else None,
        tokens=reading.beside(TOKENS, fields.get("tokens"), ()),
        truncated=reading.beside(TRUNCATED, fields["truncated"], ()),
        notes=(*notes, reading.NEWER) if newer else notes,
        cache=_cache(fields),
        timings=_timings(fields),
        images=IMAGES.validate_json(fields["images"]) if "images" in fields else (),
        approximate=APPROXIMATE.validate_json(fields["approximate"]) if "approximate" in fields else (),
        memory=reading.beside(MEMORY, fields.get("memory"), None),
        error=ERROR.validate_json(fields["error"]) if "error" in fields else None,
    )


def model_of(snapshot: Sequence[Any]) -> str | None:
    """The model of a job that has not ended: whose workers its end depends on."""
    flat, standing = snapshot
    return flat[flat.index(b"model") + 1].decode() if flat and standing else None


def _load(fields: Mapping[str, bytes]) -> Load:
    left = 1 - int(fields["step"]) / int(fields["steps"])
    return Load(cost_ms=int(fields["cost"]) * left, images=int(fields["rows"]), alone_ms=int(fields["alone"]) * left)


def _start_s(fields: Mapping[str, bytes], crew: Crew) -> float:
    """Of a cold start, what is left since the job joined the queue. By this machine's clock, which may be a little
    apart from the store's."""
    if fields["state"] != b"queued":
        return 0.0
    waited_s = time.time() - int(fields.get("waiting", fields["created"])) / 1000
    return max(0.0, crew.start_s(int(fields.get("pixels", 0))) - max(0.0, waited_s))


def event(entry: Sequence[Any], preview: bytes | None) -> JobEvent:
    entry_id, flat = entry
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    return JobEvent(
        id=entry_id.decode(),
        state=JobState(fields[b"state"].decode()),
        step=int(fields[b"step"]),
        steps=int(fields[b"steps"]),
        attempt=int(fields[b"attempt"]),
        fence=int(fields[b"fence"]),
        index=int(fields[b"index"]) if b"index" in fields else None,
        preview=preview,
    )


def tiers(ahead: Mapping[str, Tier], used: Mapping[str, Tier]) -> dict[str, Tier]:
    """What the text cost: a unit encoded while the job waited counts as encoded, wherever the worker found it."""
    return {**ahead, **used} | {unit: tier for unit, tier in ahead.items() if tier is Tier.ENCODED}


def _cache(fields: Mapping[str, bytes]) -> CacheReport | None:
    if "ahead" not in fields and "cache" not in fields:
        return None
    ahead, used = (reading.beside(TIERS, fields.get(name), {}) for name in ("ahead", "cache"))
    cost = tiers(ahead, used).values()
    counts = {tier: sum(each is tier for each in cost) for tier in Tier}
    return CacheReport(memory=counts[Tier.MEMORY], redis=counts[Tier.REDIS], encoded=counts[Tier.ENCODED])


def _timings(fields: Mapping[str, bytes]) -> Timings:
    """The replica's stages as the settlement told them, between those that the record itself has. Of an attempt that
    was made before the one under way nothing is told but that it took time."""
    own = reading.beside(TIMINGS, fields.get("timings"), Timings())
    joined = "waiting" if "waiting" in fields else "created"
    return dataclasses.replace(
        own,
        admission_s=_seconds(fields, "admission"),
        retried_s=_between(fields, "created", joined) or None,  # it joins the queue when it is logged
        queued_s=_between(fields, joined, "started"),
        total_s=_between(fields, "created", "finished"),
        told_s=_between(fields, "finished", "told"),
        ahead_s=_seconds(fields, "ahead_took"),
    )


def _seconds(fields: Mapping[str, bytes], name: str) -> float | None:
    return float(fields[name]) / 1000 if name in fields else None


def _between(fields: Mapping[str, bytes], start: str, end: str) -> float | None:
    return _after(int(fields[start]), int(fields[end])) if start in fields and end in fields else None


def _after(start_ms: int, end_ms: int) -> float:
    """Seconds between; none where the store's clock went back, as after a failover."""
    return max(0, end_ms - start_ms) / 1000
