"""Whether the times of the settings fit each other and the jobs: what a stop lets finish, what may wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import redis

from serve.doctor.findings import Finding, ok, warning
from serve.doctor.redis_servers import JOBS, job_redis
from serve.embedded import check_redis_url
from serve.errors import OperatorError
from serve.jobs.schema import FIRST, SCHEMA
from serve.settings.tree import Settings

LOOKED_AT = 200
"""Jobs, the newest, whose times are looked at; of those that wait, the first."""


def check_patience(settings: Settings) -> list[Finding]:
    found = list(_settings(settings))
    with suppress(OperatorError, redis.RedisError):  # told of Redis itself
        url = job_redis(settings)
        if url is not None:
            with check_redis_url(url, JOBS) as client:
                found += [*_drains(settings, client), *_unread(client)]
    return found or [ok("times", "times", "what may wait and what may be finished fit each other")]


def _settings(settings: Settings) -> Iterator[Finding]:
    http, jobs = settings.http, settings.jobs
    if http.replicas > 1 and http.drain_s < http.wait_s:
        told = f"a roll-out cuts synchronous calls after {http.drain_s:g} s; http.wait_s gives them {http.wait_s:g} s"
        yield warning("calls-cut", "http.drain_s", told, f"http.drain_s: {http.wait_s:g}, and the processes that grace")
    if jobs.queue_ttl_s < jobs.max_queued_s:
        told = f"{jobs.queue_ttl_s:g} s; jobs.max_queued_s lets in work of {jobs.max_queued_s:g} s, whose end expires"
        yield warning("queue-time", "jobs.queue_ttl_s", told, "raise it above jobs.max_queued_s, or lower that")


def _drains(settings: Settings, client: Any) -> Iterator[Finding]:
    """The least patient placement against the longest run: which of them drew it is not looked at."""
    drains = [settings.placement_named(name).drain_s for name in settings.placements] or [settings.diffusion.drain_s]
    took_s = [
        (float(finished) - float(started)) / 1000
        for state, started, finished in _records(client, "tandem:records", "state", "started", "finished")
        if state == b"succeeded" and started and finished
    ]
    longest = max(took_s, default=0.0)
    if longest > min(drains):
        told = (
            f"{min(drains):g} s, and one of the last {len(took_s)} jobs took {longest:.0f} s from its claim to its end"
        )
        cure = "longer, and the processes' grace with it: what is not finished is given back and begun again elsewhere"
        yield warning("drain-short", "diffusion.drain_s", told, cure)


def _unread(client: Any) -> Iterator[Finding]:
    schemas = [int(schema or FIRST) for (schema,) in _records(client, "tandem:queue", "schema")]
    if newer := [schema for schema in schemas if schema > SCHEMA.newest]:
        told = f"{len(newer)} jobs that wait were ordered through a newer release, and no worker of this one draws them"
        yield warning("jobs-newer", JOBS, told, "start that release's workers again; else they expire")


def _records(client: Any, index: str, *fields: str) -> Sequence[Sequence[bytes | None]]:
    """Of the first jobs of the queue, or of the newest of all, as the index has them."""
    ids = client.zrange(index, 0, LOOKED_AT - 1, desc=index != "tandem:queue")
    pipeline = client.pipeline(transaction=False)
    for job_id in ids:
        pipeline.hmget(f"tandem:job:{job_id.decode()}", fields)
    found: Sequence[Sequence[bytes | None]] = pipeline.execute()
    return found
