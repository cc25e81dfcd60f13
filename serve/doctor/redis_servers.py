"""The two Redis servers: whether the one for jobs loses none, and the one for embeddings forgets as it should."""

from __future__ import annotations

import re
from collections.abc import Iterator

from serve.doctor.findings import Finding, fault, ok, refused, warning
from serve.doctor.redis_look import Look, look
from serve.embedded import running_url
from serve.errors import OperatorError
from serve.settings.tree import Settings

JOBS, CACHE = "jobs.redis_url", "cache.redis_url"
OLDEST = (6, 2)
SLOW_S = 0.01
"""Of a round trip: an order takes several."""
SLOW_WRITE_S = 0.03
"""Of a write that is on the disk: every order and transition waits for one."""
CLOCK_S = 2.0
FULL = 0.8
"""Share of memory from which on it is told; docs/operations.md has the same for the metric."""
_STOPPED = 0.98


def check_redis_servers(settings: Settings) -> list[Finding]:
    """Of those that the settings name, and of the one for jobs that a running `tandem up` has started."""
    found: list[Finding] = []
    jobs, cache = _seen_jobs(settings, found), _seen_cache(settings, found)
    if jobs is not None:
        found += [*common_findings(jobs), *jobs_findings(jobs)]
    if cache is not None:
        found += [*common_findings(cache), *cache_findings(cache, settings.cache.timeout_s)]
    if jobs is not None and cache is not None and jobs.told("run_id", 0) == cache.told("run_id", 1):
        cure = "give the embeddings a Redis of their own: jobs want noeviction, embeddings allkeys-lfu"
        found.append(fault("redis-one-server", CACHE, "it is the server of jobs.redis_url", cure))
    return found


def job_redis(settings: Settings) -> str | None:
    """The URL of the job Redis as far as there is one now: the settings', or that of a running `tandem up`."""
    given = settings.jobs.redis_url
    return given.get_secret_value() if given is not None else running_url(settings.data_dir)


def _seen_jobs(settings: Settings, found: list[Finding]) -> Look | None:
    try:
        url = job_redis(settings)
        if url is not None:
            return look(url, JOBS)
    except OperatorError as error:
        found.append(_away(error))
        return None
    found.append(ok("redis-own", JOBS, "none is named: `tandem up` starts one of its own under data_dir"))
    return None


def _seen_cache(settings: Settings, found: list[Finding]) -> Look | None:
    given = settings.cache.redis_url
    if given is None:
        found.append(ok("redis-own", CACHE, "none is named: `tandem up` starts one of its own under data_dir"))
        return None
    try:
        return look(given.get_secret_value(), CACHE)
    except OperatorError as error:
        found.append(_away(error))
        return None


def _away(error: OperatorError) -> Finding:
    return refused("redis-away", error, "start it, mend the URL or the password, or open the way to it from here")


def common_findings(seen: Look) -> Iterator[Finding]:
    """What is asked of either."""
    at = f"Redis at {seen.place}"
    if seen.refusal is not None:
        cure = "look at its role, memory, disk and the rights of this user (+@all ~tandem:* &tandem:* +eval)"
        yield fault("redis-refuses", seen.setting, f"{at} refuses to write: {seen.refusal}", cure)
    if not seen.info:
        cure = "let this user run INFO, or look at its role, policy and persistence where it is managed"
        yield warning("redis-silent", seen.setting, f"{at} does not let itself be looked at (INFO)", cure)
        return
    version = str(seen.told("redis_version", "0"))
    if _numbers(version) < OLDEST:
        least = ".".join(map(str, OLDEST))
        yield fault("redis-old", seen.setting, f"{at} is {version}", f"upgrade it to {least} or later")
    if seen.told("cluster_enabled"):
        yield fault(
            "redis-cluster", seen.setting, f"{at} is a Redis Cluster", "take one server, with a replica behind it"
        )
    if seen.told("role", "master") != "master":
        yield fault("redis-role", seen.setting, f"{at} is a replica, which takes no writes", "name its master")
    if (most := seen.told("maxclients")) and seen.told("connected_clients", 0) > FULL * most:
        told = f"{at} has {seen.told('connected_clients')} of at most {most} connections"
        yield warning("redis-connections", seen.setting, told, "raise its maxclients")
    yield _clock(seen)


def _clock(seen: Look) -> Finding:
    if abs(seen.ahead_s) <= CLOCK_S:
        return ok("clock-redis", "clock", f"{seen.setting}: its clock and this one are {abs(seen.ahead_s):.2f} s apart")
    side = "ahead of" if seen.ahead_s > 0 else "behind"
    told = f"the clock of Redis at {seen.place} is {abs(seen.ahead_s):.0f} s {side} this machine's"
    return warning(
        "clock-redis", "clock", told, "run an NTP client on both; leases and keys go by that of the job Redis"
    )


def jobs_findings(seen: Look) -> Iterator[Finding]:
    yield from _durable(seen)
    policy = seen.told("maxmemory_policy", seen.config.get("maxmemory-policy"))
    if policy not in (None, "noeviction"):
        told = f"its maxmemory-policy is {policy}: when it is full it forgets jobs that were accepted"
        yield fault("jobs-redis-evicts", JOBS, told, "CONFIG SET maxmemory-policy noeviction, and in its file")
    yield from _memory(seen)
    if seen.ping_s > SLOW_S:
        told = f"a round trip takes {seen.ping_s * 1000:.1f} ms"
        yield warning("redis-slow", JOBS, told, "put it nearer, or look what it is busy with (SLOWLOG, LATENCY)")
    elif seen.write_s > SLOW_WRITE_S:
        told = f"a write takes {seen.write_s * 1000:.0f} ms"
        yield warning("jobs-redis-slow-disk", JOBS, told, "a disk with a fast fsync; every order waits for one")
    else:
        yield _fine(seen, f"a round trip takes {seen.ping_s * 1000:.2f} ms, a write {seen.write_s * 1000:.2f} ms")


def _durable(seen: Look) -> Iterator[Finding]:
    """Replicas may stand in for a file, as managed ones have it."""
    if seen.told("aof_enabled") == 0:
        replicas = seen.told("connected_slaves", 0)
        tell, kept = (warning, f"only {replicas} replicas have it too") if replicas else (fault, "is lost when it ends")
        told = f"it has no append-only file: what it was given {kept}"
        yield tell("jobs-redis-no-file", JOBS, told, "CONFIG SET appendonly yes, and in its file")
    elif (often := seen.config.get("appendfsync")) not in (None, "always"):
        told = f"its appendfsync is {often}: jobs of the last second or more, which clients were told of, may be lost"
        yield warning("jobs-redis-fsync", JOBS, told, "CONFIG SET appendfsync always, and in its file")
    if seen.told("aof_last_write_status", "ok") != "ok" or seen.told("aof_last_bgrewrite_status", "ok") != "ok":
        told = "it could not write its append-only file"
        yield fault("jobs-redis-file-fails", JOBS, told, "room and rights on its disk; its log has the reason")


def _memory(seen: Look) -> Iterator[Finding]:
    used = seen.told("used_memory", 0) - seen.told("mem_not_counted_for_evict", 0)
    limit, machine = seen.told("maxmemory", 0), seen.told("total_system_memory", 0)
    most, whose = (limit, "its maxmemory") if limit else (machine, "its machine's memory")
    if not most or used < FULL * most:
        return
    told = f"{used / 2**20:.0f} of {most / 2**20:.0f} MiB, {whose}, are taken; it refuses orders when full"
    cure = "more memory, a shorter jobs.result_ttl_s, or a smaller jobs.max_queued"
    if used >= _STOPPED * most:
        yield fault("jobs-redis-full", JOBS, told, cure)
    else:
        yield warning("jobs-redis-full", JOBS, told, cure)


def cache_findings(seen: Look, timeout_s: float) -> Iterator[Finding]:
    policy = seen.told("maxmemory_policy", seen.config.get("maxmemory-policy"))
    if policy == "noeviction":
        told = "its maxmemory-policy is noeviction: once it is full, new texts are encoded each time"
        yield warning("cache-redis-keeps", CACHE, told, "CONFIG SET maxmemory-policy allkeys-lfu, and in its file")
    if seen.told("maxmemory") == 0:
        told = "it has no maxmemory: it grows until its machine's memory is full"
        yield warning("cache-redis-unbounded", CACHE, told, "CONFIG SET maxmemory, such as 2gb, and in its file")
    if seen.told("aof_enabled"):
        told = "it has an append-only file, which only slows down what may be lost"
        yield warning("cache-redis-file", CACHE, told, "CONFIG SET appendonly no, and in its file")
    if seen.ping_s > timeout_s:
        told = f"a round trip takes {seen.ping_s * 1000:.0f} ms, and is given up after {timeout_s * 1000:.0f}"
        yield fault("redis-slow", CACHE, told, "put it nearer, or raise cache.timeout_s")
    elif seen.ping_s > SLOW_S:
        told = f"a round trip takes {seen.ping_s * 1000:.1f} ms"
        yield warning("redis-slow", CACHE, told, "put it nearer, or look what it is busy with (SLOWLOG, LATENCY)")
    else:
        yield _fine(seen, f"a round trip takes {seen.ping_s * 1000:.2f} ms")


def _fine(seen: Look, told: str) -> Finding:
    return ok("redis-answers", seen.setting, f"Redis {seen.told('redis_version', '?')} at {seen.place}: {told}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
