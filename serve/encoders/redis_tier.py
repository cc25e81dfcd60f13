"""The second cache tier: Redis, shared by all processes. It may cost time, never an error and never a wrong value."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from serve.settings import CacheSettings
from serve.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

PREFIX = "tandem:embedding:"
MAGIC = b"TDM1"
CHECKSUM_BYTES = 16
PAUSE_S = 5.0
"""How long Redis is left alone after it failed: each wait for it would cost every request the full timeout."""

T = TypeVar("T")


def seal(key: str, value: bytes) -> bytes:
    """Magic, checksum, value. The checksum covers the key: a value in the wrong place is as wrong as a flipped bit."""
    return MAGIC + _checksum(key, value) + value


def unseal(key: str, sealed: bytes) -> bytes | None:
    """The value, or None where it is not, bit for bit, what was sealed under this key."""
    head = len(MAGIC) + CHECKSUM_BYTES
    value = sealed[head:]
    return value if sealed[:head] == MAGIC + _checksum(key, value) else None


class RedisTier:
    """Owns: the connections to the cache Redis, and the knowledge of when it failed last."""

    def __init__(self, url: str, settings: CacheSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._resting_until = 0.0
        self._client = redis.asyncio.Redis.from_url(
            url,
            socket_timeout=settings.timeout_s,
            socket_connect_timeout=settings.timeout_s,
            retry=Retry(NoBackoff(), 0),
        )

    async def get(self, keys: Sequence[str]) -> dict[str, bytes]:
        """What Redis holds of `keys`, in one round trip. Absent, corrupt and unreachable look the same: not there."""
        return await self._guarded(lambda: self._read(keys)) or {}

    async def put(self, values: Mapping[str, bytes]) -> dict[str, bytes]:
        """Store what fits. The first writer of a key wins, and what it wrote is returned for the keys that others won.

        So all replicas use the same bits, even where two of them encoded one unit at the same time.
        """
        sealed = {key: seal(key, value) for key, value in values.items()}
        fitting = {key: value for key, value in sealed.items() if len(value) <= self._settings.max_value_bytes}
        return await self._guarded(lambda: self._write(fitting)) or {} if fitting else {}

    async def close(self) -> None:
        await self._client.aclose()

    async def _read(self, keys: Sequence[str]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for key, sealed in zip(keys, await self._client.mget([PREFIX + key for key in keys]), strict=True):
            if sealed is None:
                continue
            value = unseal(key, sealed) if isinstance(sealed, bytes) else None
            if value is None:
                self._metrics.inc("tandem_cache_errors_total", kind="corrupt")
            else:
                found[key] = value
        return found

    async def _write(self, sealed: Mapping[str, bytes]) -> dict[str, bytes]:
        lost = [key for key, won in zip(sealed, await self._set(sealed, nx=True), strict=True) if not won]
        if not lost:
            return {}
        earlier = await self._read(lost)
        # A corrupt value, or something that is no string, must not keep its place.
        await self._set({key: sealed[key] for key in lost if key not in earlier}, nx=False)
        return earlier

    async def _set(self, sealed: Mapping[str, bytes], *, nx: bool) -> list[object]:
        pipeline = self._client.pipeline(transaction=False)
        for key, value in sealed.items():
            pipeline.set(PREFIX + key, value, nx=nx, px=max(1, int(self._settings.ttl_s * 1000)))
        return list(await pipeline.execute()) if sealed else []

    async def _guarded(self, call: Callable[[], Awaitable[T]]) -> T | None:
        if time.monotonic() < self._resting_until:
            return None
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                return await call()
        except (TimeoutError, redis.exceptions.TimeoutError):
            kind = "timeout"
        except ResponseError as error:
            # It answered, and at once: nothing to rest from.
            self._metrics.inc("tandem_cache_errors_total", kind="down")
            log.warning("the cache Redis refuses a command: %s", error)
            return None
        except (RedisError, OSError):
            kind = "down"
        self._metrics.inc("tandem_cache_errors_total", kind=kind)
        self._resting_until = time.monotonic() + PAUSE_S
        log.warning("the cache Redis is not used for %.0f s (%s); see cache.redis_url", PAUSE_S, kind)
        return None


def _checksum(key: str, value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=CHECKSUM_BYTES, key=key.encode()).digest()
