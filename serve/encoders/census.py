"""Who keeps which embeddings: every process reports to the cache Redis, and reads there when it is to forget.

A process that says nothing for `GONE_S` is no longer counted. All times are Unix seconds on the clock of that Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from serve.encoders.cache import CacheStats, EmbeddingCache
from serve.encoders.redis_tier import ALL, connect
from serve.errors import BackendUnavailable

log = logging.getLogger(__name__)

REPORTS = "tandem:census"
"""Hash: id of a process -> its report. `SEEN` is a sorted set: the same ids by the time of their last report."""
SEEN = "tandem:census:seen"
EPOCH = "tandem:census:epoch"
"""A new value tells every process to empty its memory. It is random: a counter that was evicted would repeat itself."""
TICK_S = 2.0
GONE_S = 10.0
_ANSWER_S = 2.0
_PAGE = 1000
_REPORT = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], tostring(now), ARGV[1])
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', tostring(now - ARGV[3]))) do
  redis.call('HDEL', KEYS[1], id)
  redis.call('ZREM', KEYS[2], id)
end
redis.call('PEXPIRE', KEYS[1], 2000 * ARGV[3])
redis.call('PEXPIRE', KEYS[2], 2000 * ARGV[3])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessReport(CacheStats):
    """The cache of one process. `place` is the kind of process, `name` the encoder or the replica."""

    place: str
    name: str

    @classmethod
    def of(cls, cache: EmbeddingCache, name: str) -> Self:
        stats = cache.stats()
        same = {each.name: getattr(stats, each.name) for each in fields(stats)}
        return cls(place=cache.place, name=name, **same)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessCensus:
    """A process's latest report, and when it came."""

    report: ProcessReport
    updated_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisCensus:
    """The cache Redis as it counts itself. `max_bytes` is 0 without a bound. `keys` holds a handful beside the
    embeddings; `hits` and `misses` count look-ups of keys since it started, `evicted` keys that made room."""

    keys: int
    bytes: int
    max_bytes: int
    hits: int
    misses: int
    evicted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCensus:
    """The embedding cache at one moment; the processes in order of place and name."""

    at: float
    processes: tuple[ProcessCensus, ...]
    redis: RedisCensus


_JSON = TypeAdapter(ProcessReport)


class CensusTaker:
    """Reports the stats of one cache, and empties its memory when told to. Silent where Redis is away.

    Owns: the task that does so, and its connection.
    """

    def __init__(self, cache: EmbeddingCache, redis_url: str | None, name: str, *, tick_s: float = TICK_S) -> None:
        """`name` tells this process from the others of its place. Without a URL there is nothing to do."""
        self._cache = cache
        self._url = redis_url
        self._name = name
        self._tick_s = tick_s
        self._id = f"{cache.place}/{name}/{secrets.token_hex(8)}"
        self._epoch: bytes | str | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """In the event loop of the cache."""
        if self._url and self._task is None:
            self._task = asyncio.create_task(self._run(connect(self._url)))

    async def close(self) -> None:
        """The process is no longer counted from now on."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, redis: Redis) -> None:
        report = redis.register_script(_REPORT)
        try:
            while True:
                async with _silently("the cache census"):
                    # One that is full still says when to forget.
                    self._obey(await redis.get(EPOCH))
                    own = _JSON.dump_json(ProcessReport.of(self._cache, self._name))
                    await report(keys=[REPORTS, SEEN], args=[self._id, own, GONE_S])
                await asyncio.sleep(self._tick_s)
        finally:
            async with _silently("leaving the cache census"):
                pipeline = redis.pipeline(transaction=False)
                pipeline.hdel(REPORTS, self._id)
                pipeline.zrem(SEEN, self._id)
                await pipeline.execute()
            await redis.aclose()

    def _obey(self, epoch: bytes | str | None) -> None:
        if epoch is not None and epoch != self._epoch:
            # The first epoch that is seen may be a new one, too: at the start there is little to lose.
            self._epoch = epoch
            self._cache.clear()


async def read_census(redis_url: str) -> CacheCensus:
    """BackendUnavailable where the cache Redis does not answer."""
    async with _session(redis_url) as redis:
        pipeline = redis.pipeline(transaction=True)
        pipeline.time()
        pipeline.hgetall(REPORTS)
        pipeline.zrange(SEEN, 0, -1, withscores=True)
        pipeline.info()
        pipeline.dbsize()
        async with asyncio.timeout(_ANSWER_S):
            (seconds, microseconds), reports, seen, info, keys = await pipeline.execute()
    now = seconds + microseconds / 1e6
    processes = [
        ProcessCensus(report=report, updated_at=at)
        for key, at in seen
        if now - at < GONE_S and (report := _parsed(reports.get(key))) is not None
    ]
    return CacheCensus(
        at=now,
        processes=tuple(sorted(processes, key=lambda each: (each.report.place, each.report.name))),
        redis=_counted(info, keys),
    )


async def clear_all(redis_url: str) -> int:
    """Remove all embeddings from Redis, then have every process empty its memory; how many Redis had.

    Processes hear it at their next tick. What is being encoded meanwhile is stored as ever. BackendUnavailable where
    the cache Redis does not answer; some embeddings may be gone then.
    """
    removed = 0
    async with _session(redis_url) as redis:
        cursor, first = 0, True
        while cursor or first:
            async with asyncio.timeout(_ANSWER_S):
                cursor, page = await redis.scan(cursor, match=f"{ALL}*", count=_PAGE)
                first = False
                removed += await redis.unlink(*page) if page else 0
        async with asyncio.timeout(_ANSWER_S):
            await redis.set(EPOCH, secrets.token_hex(8))
    return removed


def _parsed(report: bytes | None) -> ProcessReport | None:
    """None for what another release wrote in another form."""
    try:
        return _JSON.validate_json(report or b"")
    except ValidationError:
        return None


def _counted(info: Mapping[str, Any], keys: int) -> RedisCensus:
    return RedisCensus(
        keys=keys,
        bytes=info["used_memory"],
        max_bytes=info["maxmemory"],
        hits=info["keyspace_hits"],
        misses=info["keyspace_misses"],
        evicted=info["evicted_keys"],
    )


@contextlib.asynccontextmanager
async def _session(url: str) -> AsyncIterator[Redis]:
    redis = connect(url)
    try:
        yield redis
    except (RedisError, OSError, TimeoutError) as error:
        log.warning("the cache Redis: %s", error)
        raise BackendUnavailable("the shared embedding cache does not answer", "cache.redis_url", 1.0) from None
    finally:
        await redis.aclose()


@contextlib.asynccontextmanager
async def _silently(doing: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(_ANSWER_S):
            yield
    except (RedisError, OSError, TimeoutError) as error:
        log.debug("%s: %s", doing, error)
