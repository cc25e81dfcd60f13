"""Bugs planted in the scripts themselves: the checker sees each of them in what clients and workers see.

A story walks jobs through everything that may happen to them, with the scripts as they are and with one line broken.
No rule reads a script's own bookkeeping: only streams, settlements and answers. A script that trips over its own bug
answers nothing, as a store that is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Awaitable, Mapping
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr
from support.chaos_collect import collected
from support.history import Accepted, Entry, Heard, Put, Refused, Unheard, violations
from support.jobs import BROKEN, a_request

from serve.domain.jobs import ImageRef, JobState, Timings
from serve.errors import BackendUnavailable, LeaseLost, QueueFull
from serve.jobs import scripts
from serve.jobs.store import Claim, JobStore, Want
from serve.settings.stores import JobSettings
from serve.telemetry.metrics import InProcessMetrics

MAX_QUEUED, MAX_ATTEMPTS = 4, 3


class Story:
    """Two workers, and jobs that each have a model of their own: so a worker claims which job it means. Only the
    `queued` ones share a model, and its queue."""

    def __init__(self, url: str, folder: Path) -> None:
        settings = JobSettings(
            redis_url=SecretStr(url), lease_s=600, max_queued=MAX_QUEUED, max_attempts=MAX_ATTEMPTS, retry_backoff_s=0
        )
        self.store = JobStore(settings, InProcessMetrics(), folder)
        self.raw = redis.Redis.from_url(url)
        self.told: list[Entry] = []
        self.puts: dict[str, Put] = {}
        self.turned_away: list[str] = []

    async def submit(self, *jobs: str) -> None:
        for job in jobs:
            try:
                await self.store.submit(job, a_request(job, model=model_of(job)))
            except QueueFull:
                self.tell(Refused(job=job))
            except BackendUnavailable:
                self.tell(Unheard(job=job))
            else:
                self.tell(Accepted(job=job))

    def tell(self, entry: Entry) -> None:
        """Once: the same answer to the same call is no news."""
        if entry not in self.told:
            self.told.append(entry)

    async def claim(self, job: str) -> Claim | None:
        with contextlib.suppress(BackendUnavailable):
            claim = await self.store.claim("worker", [Want(model_of(job), 0, 2**31)])
            if isinstance(claim, Claim):
                self.told.append(Heard(job=claim.job_id, fence=claim.fence, what="claimed"))
                return claim
        return None

    async def lapse(self, *jobs: str) -> None:
        for job in jobs:
            self.raw.zadd("tandem:leases", {job: 1}, xx=True)
        await self.reap()

    async def reap(self) -> None:
        with contextlib.suppress(BackendUnavailable):
            await self.store.reap()

    async def cancel(self, job: str) -> None:
        with contextlib.suppress(BackendUnavailable):
            await self.store.cancel(job)

    async def renew(self, claim: Claim | None, step: int, state: JobState = JobState.RUNNING) -> None:
        if claim:
            with contextlib.suppress(LeaseLost, BackendUnavailable):
                await self.store.renew(claim, step, state)
                self.told.append(Heard(job=claim.job_id, fence=claim.fence, what="renewed"))

    async def settle(self, claim: Claim | None, outcome: str) -> None:
        """What the worker hears is part of the history; only a success has objects."""
        if claim is None:
            return
        image = ImageRef(
            index=0, key=f"{claim.job_id}/0.png", seed=1, width=64, height=64, content_type="image/png", bytes=9
        )
        if outcome == "succeeded":
            for key in (image.key, f"{claim.job_id}/manifest.json"):
                self.puts.setdefault(key, Put(key=key, version="1", bytes=9))
        write: Awaitable[object]
        match outcome:
            case "succeeded":
                write = self.store.succeed(claim, images=[image], cache={}, timings=Timings())
            case "release":
                write = self.store.release(claim)
            case _:
                write = self.store.fail(claim, BROKEN, retry=outcome == "retry")
        with contextlib.suppress(LeaseLost, BackendUnavailable):
            await write
            self.tell(Heard(job=claim.job_id, fence=claim.fence, what=outcome))

    async def draw(self, job: str) -> Claim | None:
        claim = await self.claim(job)
        await self.renew(claim, 2)
        await self.renew(claim, 4, JobState.STORING)
        await self.settle(claim, "succeeded")
        return claim

    async def run(self) -> None:
        await self.submit("plain", "plain")
        claim = await self.draw("plain")
        await self.settle(claim, "succeeded")  # its answer was lost
        await self.renew(claim, 4)
        await self.cancel("plain")
        await self.submit("plain")

        await self.submit("stolen")
        late = await self.claim("stolen")
        await self.renew(late, 3)
        await self.lapse("stolen")
        successor = await self.claim("stolen")
        await self.renew(successor, 1)
        await self.renew(late, 4, JobState.STORING)
        await self.settle(late, "succeeded")
        await self.settle(successor, "succeeded")

        await self.submit("orphan")  # its worker speaks while the job waits for another
        late = await self.claim("orphan")
        await self.lapse("orphan")
        await self.settle(late, "retry")
        await self.renew(late, 2)
        await self.draw("orphan")

        await self.submit("poison")
        for _ in range(MAX_ATTEMPTS + 1):
            await self.claim("poison")
            await self.lapse("poison")

        await self.submit("flaky")
        for outcome in ("release", "release", "retry", "succeeded"):
            await self.settle(await self.claim("flaky"), outcome)

        await self.submit("both")  # two workers ask for it
        first, second = await self.claim("both"), await self.claim("both")
        for claim in (first, second):
            await self.renew(claim, 3)
            await self.renew(claim, 1, JobState.STORING)
            await self.renew(claim, 4)
            await self.settle(claim, "succeeded")

        await self.submit("unwanted", "withdrawn", "late")
        await self.cancel("withdrawn")
        await self.claim("unwanted")
        await self.cancel("unwanted")
        await self.lapse("unwanted")
        self.raw.zadd("tandem:deadlines", {"late": 1}, xx=True)
        await self.draw("late")
        await self.reap()

        await self.submit("queued-and-withdrawn")
        await self.cancel("queued-and-withdrawn")  # its place is free again
        await self.submit(*(f"queued{number}" for number in range(MAX_QUEUED)))
        self.turned_away = [entry.job for entry in self.told if isinstance(entry, Refused)]
        await self.submit("queued-too-many", "queued-too-many-again")
        await self.afterwards()

    async def afterwards(self) -> None:
        """Whatever is still in an index by mistake comes to light: leases and deadlines pass, and workers ask on."""
        jobs = list(dict.fromkeys(entry.job for entry in self.told if not isinstance(entry, Put)))
        for job in jobs:
            await self.draw(job)
        await self.lapse(*jobs)
        for job in jobs:
            await self.draw(job)
        ended = [job for job in jobs if isinstance(job, str) and self.raw.hget(f"tandem:job:{job}", "finished")]
        for job in ended:
            self.raw.zadd("tandem:deadlines", {job: 1}, xx=True)
        await self.reap()


def model_of(job: str) -> str:
    return "crowd" if job.startswith("queued") else job


def told_of(url: str, folder: Path = scripts.FOLDER) -> list[str]:
    async def run() -> list[str]:
        story = Story(url, folder)
        try:
            await asyncio.wait_for(story.run(), 60)
            found = violations(await collected(story.store, story.told, story.puts.values()), MAX_ATTEMPTS)
            return found + [f"{job}: was turned away, and there was room" for job in story.turned_away]
        finally:
            await story.store.close()
            story.raw.close()

    return asyncio.run(run())


FULL = "if refused then return {ended, refused} end"
ANSWER = "return {ended, {'queued', id, snapshot(id), limits_of(owner, buckets, most_unfinished)}}"
FENCED = "return HELD[state] ~= nil and current == fence"
CLAIMED = "redis.call('HINCRBY', job_key(id), '{}', 1)"
MUTANTS: dict[str, tuple[str, Mapping[str, str]]] = {
    "a late worker settles": ("settle", {"if not holds(id, fence) then return {ended, 'lost'} end": ""}),
    "a late worker renews": ("renew", {"if holds(id, fence) then": "if HELD[get(id, 'state')] then"}),
    "no fence is compared": ("common", {FENCED: "return HELD[state] ~= nil"}),
    "fences without a state": ("common", {FENCED: "return current == fence"}),
    "one attempt too many": ("common", {"elseif tonumber(attempt) < MAX": "elseif tonumber(attempt) <= MAX"}),
    "an end is not told": ("common", {"'finished', now, ...)\n  emit(id)": "'finished', now, ...)"}),
    "who ended stays in the queue": (
        "common",
        {"  dequeue(id)\n  redis.call('ZREM', LEASES": "  redis.call('ZREM', LEASES"},
    ),
    "who ended keeps its lease": ("common", {"  dequeue(id)\n  redis.call('ZREM', LEASES, id)": "  dequeue(id)"}),
    "who ended keeps its deadline": ("common", {"  redis.call('ZREM', DEADLINES, id)\n  count(": "  count("}),
    "a claim without a new fence": ("claim", {CLAIMED.format("fence"): "tonumber(fence)"}),
    "a claim is no attempt": ("claim", {CLAIMED.format("attempt"): "tonumber(attempt)"}),
    "a claim leaves the job queued": ("claim", {"\ndequeue(id)\n": "\n"}),
    "a second submission starts anew": ("submit", {"job = former(name, id, owner, fingerprint)": "job"}),
    "a refused job is queued": (
        "submit",
        {
            FULL: "",
            ANSWER: f"{FULL} {ANSWER}",
        },
    ),
    "a lapsed lease loses the job": ("reap", {"retry(id, 0, ARGV[5])": "redis.call('ZREM', LEASES, id)"}),
    "going back is not queueing": ("common", {"now + delay)\n  enqueue(id)": "now + delay)"}),
    "going back is not told": ("common", {"AFTER_INTERACTIVE or 0), id)\n  emit(id)": "AFTER_INTERACTIVE or 0), id)"}),
    "a cancel ends what has ended": ("cancel", {"if state == 'queued' then": "if not HELD[state] then"}),
    "steps go back": ("renew", {"if step > tonumber(done) then set(": "if true then set("}),
    "states go back": ("renew", {"HELD[state] > HELD[before]": "state ~= before"}),
}


def test_the_scripts_as_they_are_keep_every_rule(redis_url: str) -> None:
    assert told_of(redis_url) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(redis_url: str, tmp_path: Path, name: str) -> None:
    script, changes = MUTANTS[name]
    folder = shutil.copytree(scripts.FOLDER, tmp_path / "scripts")
    place = folder / f"{script}.lua"
    text = place.read_text(encoding="utf-8")
    for sound, broken in changes.items():
        assert text.count(sound) == 1, "the script has changed: plant the bug anew"
        text = text.replace(sound, broken)
    place.write_text(text, encoding="utf-8")
    assert told_of(redis_url, folder)
