"""Many images in one go, and whether anything grows meanwhile: memory, descriptors, threads, keys, files."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import redis

from loadtest.bench.soak_watch import WHOLE_SIDE, Judged, Look, RedisUse, Watch
from loadtest.driver import Progress, drive
from loadtest.samples import Arrival, Outcome, Sample
from loadtest.servers import Budget, serving
from serve.bench.machine import Machine, this_machine
from serve.bench.stats import Percentiles
from serve.errors import OperatorError
from serve.settings.room import MIB
from serve.shapes.captions import QUALITY_WORDS, caption
from serve.shapes.draw import sample_scene

SIDE = 64
"""The smallest size: so little arithmetic that the service has most of the work."""
WHOLE_EVERY = 20
"""Every so many orders one is of the size whose pictures can be judged in full."""
STEPS, WHOLE_STEPS = (3, 4, 6), 10
SCHEDULERS = ("euler", "unipc", "dpmpp_2m")
"""Those that draw what is ordered in so few steps."""
GUIDANCE = (2.5, 3.0, 4.0)
TEXTS, NEW_TEXTS = 500, 0.5
"""Half of the prompts are one of so many, the others are new: the caches are full in mid-run and evict."""
CACHE_BYTES = 8 * MIB
"""Of each process's memory and of the cache Redis, so that they fill up early."""
QUIET_S = 60.0
"""Longest wait, beyond a record's life, for the sweep to have taken everything."""
_POLL_S = 0.5
_TOLD = 40
"""Times that the progress is told."""
_GIVE_UP_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`images` orders of one picture each by `users` who always wait for one. Records and pictures live for
    `result_ttl_s` seconds. One look every `every_s` seconds, up to `judged_at_once` pictures judged at each."""

    images: int
    users: int
    result_ttl_s: float
    every_s: float
    judged_at_once: int
    seed: int
    budget: Budget

    @property
    def settings(self) -> dict[str, Any]:
        """The server's, in groups."""
        return {
            "jobs": {"result_ttl_s": self.result_ttl_s, "max_queued": max(100, 2 * self.users)},
            "http": {"max_streams": max(64, 2 * self.users)},
            "cache": {"memory_bytes": CACHE_BYTES, "embedded_bytes": CACHE_BYTES},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Fates:
    """What became of the orders, told by the clients. `jobs` are different ids, `again` jobs that took more than one
    attempt, `logged` the orders that the server logged meanwhile, by its own count. `latency` is from the order to the
    picture, None without any."""

    orders: int
    outcomes: Mapping[str, int]
    reasons: Mapping[str, int]
    jobs: int
    again: int
    logged: int
    latency: Percentiles | None

    @property
    def failed(self) -> int:
        return self.orders - self.outcomes.get(Outcome.DONE, 0)

    @property
    def doubled(self) -> int:
        """Orders that became two jobs, or jobs that two clients were given."""
        done = self.outcomes.get(Outcome.DONE, 0)
        return abs(self.logged - self.orders) + max(0, done - self.jobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What is left when the last record's time was over: `waited_s` is how long that took after the last image.
    `keys` of the job Redis were not there at the start, and `orphans` are jobs with files but without a record."""

    waited_s: float
    records: int
    keys: tuple[str, ...]
    orphans: tuple[str, ...]
    result_files: int
    jobs: RedisUse
    cache: RedisUse


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`start` is the look before the first order, when nothing of the first picture was left. `gaps` are looks that
    failed, `warnings` the last lines of the server's log that are worse than information."""

    plan: Plan
    machine: Machine
    seconds: float
    fates: Fates
    start: Look
    looks: tuple[Look, ...]
    gaps: int
    judged: tuple[Judged, ...]
    end: End
    warnings: tuple[str, ...]


Tell = Callable[[str], None]


async def soak(plan: Plan, tell: Tell) -> Report:
    """One server of our own, one run. Raises OperatorError where it does not start or can't be looked into."""
    tell("starting the server")
    async with serving("tandem", budget=plan.budget, settings=plan.settings) as server:
        with Watch(server, every_s=plan.every_s, judged_at_once=plan.judged_at_once, seed=plan.seed) as watch:
            try:
                return await _soaked(plan, server.url, watch, tell)
            except (httpx.HTTPError, redis.RedisError) as error:
                raise OperatorError(
                    f"{server.name} can't be looked into: {str(error) or type(error).__name__}"
                ) from None


async def _soaked(plan: Plan, url: str, watch: Watch, tell: Tell) -> Report:
    """Raises httpx.HTTPError or redis.RedisError for a look before or after the load that failed."""
    tell("waiting until its first picture is swept")
    await _swept(watch, plan, frozenset())
    watch.clear_cache()
    keys, start = watch.keys(), await watch.look(lambda: 0.0, lambda: 0)
    samples, seconds = await _run(plan, url, watch, tell)
    tell("waiting until everything is swept")
    began = time.monotonic()
    await _swept(watch, plan, keys)
    watch.clear_cache()
    end = _end(watch, keys, time.monotonic() - began)
    logged = watch.job_redis().submissions - start.jobs.submissions
    return Report(
        plan=plan,
        machine=this_machine(),
        seconds=seconds,
        fates=fates(samples, logged),
        start=start,
        looks=tuple(watch.looks[1:]),
        gaps=watch.gaps,
        judged=tuple(watch.judged),
        end=end,
        warnings=watch.warnings(),
    )


async def _run(plan: Plan, url: str, watch: Watch, tell: Tell) -> tuple[list[Sample], float]:
    """Looks go on beside the load, one more when it is over."""
    began, ended = time.monotonic(), list[Sample]()
    told_of = 0

    def told(progress: Progress) -> None:
        nonlocal told_of
        if progress.done >= told_of:
            tell(f"{progress.done:,} of {plan.images:,} images, {progress.failed} failed")
            told_of = progress.done + plan.images // _TOLD

    def clock() -> float:
        return time.monotonic() - began

    looking = asyncio.create_task(watch.keep_looking(clock, lambda: len(ended)))
    driving = asyncio.create_task(
        drive(url, tuple(orders(plan)), users=plan.users, give_up_s=_GIVE_UP_S, on_progress=told, into=ended)
    )
    try:
        await asyncio.wait((looking, driving), return_when=asyncio.FIRST_COMPLETED)
        if looking.done():
            looking.result()  # raises what ended it: a soak that nobody watches proves nothing
        samples = await driving
        seconds = clock()
    finally:
        for task in (looking, driving):
            task.cancel()
        await asyncio.gather(looking, driving, return_exceptions=True)
    await watch.look(lambda: seconds, lambda: len(ended))
    return samples, seconds


async def _swept(watch: Watch, plan: Plan, keys: frozenset[str]) -> None:
    """Returns when no job has a record and, where `keys` are given, no other key is left; or when that takes too long,
    which the report then says."""
    deadline = time.monotonic() + plan.result_ttl_s + QUIET_S
    while time.monotonic() < deadline:
        gone = not await asyncio.to_thread(watch.records)
        if gone and (not keys or not await asyncio.to_thread(watch.keys) - keys):
            return
        await asyncio.sleep(_POLL_S)


def _end(watch: Watch, keys: frozenset[str], waited_s: float) -> End:
    stored = watch.stored_jobs()  # before the records: a job between the two has both
    records = watch.records()
    last = watch.job_redis()
    return End(
        waited_s=waited_s,
        records=len(records),
        keys=tuple(sorted(watch.keys() - keys)),
        orphans=tuple(sorted(stored - records)),
        result_files=watch.result_files(),
        jobs=last,
        cache=watch.cache_redis(),
    )


def fates(samples: Sequence[Sample], logged: int) -> Fates:
    jobs = [one.job for one in samples if one.job is not None]
    return Fates(
        orders=len(samples),
        outcomes=dict(Counter(one.outcome.value for one in samples)),
        reasons=dict(Counter(_reason(one) for one in samples if one.outcome is not Outcome.DONE).most_common()),
        jobs=len({job["id"] for job in jobs}),
        again=sum(job.get("attempt", 1) > 1 for job in jobs),
        logged=logged,
        latency=Percentiles.of(taken)
        if (taken := [one.latency_s for one in samples if one.outcome is Outcome.DONE])
        else None,
    )


def orders(plan: Plan) -> Iterator[Arrival]:
    """The same for a seed."""
    for index in range(plan.images):
        draw = random.Random(f"{plan.seed}/order/{index}")
        whole = index % WHOLE_EVERY == WHOLE_EVERY - 1
        side = WHOLE_SIDE if whole else SIDE
        negative = ", ".join(sorted(draw.sample(QUALITY_WORDS, 2))) if draw.random() < 0.5 else ""
        body = {
            "prompt": text(plan.seed, draw.randrange(TEXTS) if draw.random() > NEW_TEXTS else TEXTS + index),
            "negative_prompt": negative,
            "num_inference_steps": WHOLE_STEPS if whole else draw.choice(STEPS),
            "guidance_scale": draw.choice(GUIDANCE),
            "scheduler": draw.choice(SCHEDULERS),
            "width": side,
            "height": side,
            "seed": draw.randrange(2**32),
        }
        yield Arrival(index=index, due_s=0.0, dialect="wait", body=body)


def text(seed: int, number: int) -> str:
    """A caption that says all that its scene has, so that the picture can be held against it."""
    scene = sample_scene(np.random.default_rng([seed, number]))
    return caption(scene, random.Random(f"{seed}/text/{number}"), complete=True)


def check(plan: Plan) -> None:
    """Raises OperatorError naming the option."""
    if plan.images < plan.users:
        raise OperatorError(f"--images: {plan.images} is less than --users {plan.users}", "images")


def _reason(sample: Sample) -> str:
    return f"{sample.outcome}: {sample.detail or sample.status}"
