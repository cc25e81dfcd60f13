"""The second cache tier: Redis, shared by all processes. It may cost time, never an error and never a wrong value."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import secrets
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

from serve.encoders.breaker import Breaker, BreakerState
from serve.encoders.libraries import computed_by
from serve.settings.stores import CacheSettings
from serve.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

ALL = "tandem:embedding:"
"""What the keys of all embeddings begin with, whoever computed them."""
PREFIX = f"{ALL}{computed_by()}:"
LEASE_PREFIX = f"tandem:encoding:{computed_by()}:"
INT8 = "int8:"
"""Between prefix and key where values are int8: after the setting is changed back, nobody reads a rounded value."""
MAGIC = b"TDM2"
"""Form of a value. Another form wants another `serve.domain.text.UNIT_SCHEME` too: else two releases side by side would
each overwrite what the other stored."""
CHECKSUM_BYTES = 16
PAUSE_S = 5.0
"""How long Redis is left alone after it failed: each wait for it would cost every request the full timeout."""
_CONNECTIONS = 32
"""Calls to Redis at once. A crowd waits for its turn here, where no clock runs against Redis: hundreds of large values
through one event loop take longer than the timeout without anybody's fault."""
_QUIET_S = 60.0
"""Refusals come with every write to a full Redis: they are counted, and logged once in a while."""
_RELEASE = """
for _, key in ipairs(KEYS) do
  if redis.call('GET', key) == ARGV[1] then redis.call('DEL', key) end
end
"""

T = TypeVar("T")


def seal(key: str, value: bytes) -> bytes:
    """Magic, checksum, value. The checksum covers the key: a value in the wrong place is as wrong as a flipped bit."""
    return MAGIC + _checksum(key, value) + value


def unseal(key: str, sealed: bytes) -> bytes | None:
    """The value, or None where it is not what was sealed under this key."""
    head = len(MAGIC) + CHECKSUM_BYTES
    value = sealed[head:]
    return value if sealed[:head] == MAGIC + _checksum(key, value) else None


def connect(url: str) -> redis.asyncio.Redis:
    """A client without timeouts and retries of its own: callers bound their calls with `asyncio.timeout`.

    With a `socket_timeout`, redis-py (8.1) sends through `asyncio.wait_for`, which on Python 3.11 may swallow a
    cancellation; and it costs a task per command.
    """
    return redis.asyncio.Redis.from_url(
        url, socket_timeout=None, socket_connect_timeout=None, protocol=2, retry=Retry(NoBackoff(), 0)
    )


class _Crowded(Exception):
    """The call had no turn in time."""


class Claimed(NamedTuple):
    """Answer to a claim: the keys whose lease is the caller's now, the token to give them back with, and what Redis
    holds of all that were asked for."""

    token: str
    won: frozenset[str]
    stored: dict[str, bytes]


class RedisTier:
    """Owns: the connections to the cache Redis, and the breaker in front of them. Belongs to one event loop."""

    def __init__(self, url: str, settings: CacheSettings, metrics: Metrics, *, pause_s: float = PAUSE_S) -> None:
        self._settings = settings
        self._metrics = metrics
        self._prefix = INT8 if settings.values == "int8" else ""
        self._pause_s = pause_s
        self._breaker = Breaker(pause_s, self._note_state)
        self.tell()
        self._turns = asyncio.Semaphore(_CONNECTIONS)
        self._limits: set[asyncio.Timeout] = set()
        self._quiet_until = 0.0
        self._answered_at = -math.inf
        self._client = connect(url)
        self._release = self._client.register_script(_RELEASE)

    @property
    def away(self) -> bool:
        """It has failed, and is left alone for now."""
        return self._breaker.resting

    def tell(self) -> None:
        """The metric of `away`, which ends by itself."""
        self._metrics.set("tandem_cache_breaker_open", self.away)

    async def get(self, keys: Sequence[str]) -> dict[str, bytes]:
        """What Redis holds of `keys`, in one round trip. Absent, corrupt and unreachable look the same: not there."""
        return await self._guarded(lambda: self._read(keys)) or {}

    async def has(self, keys: Sequence[str]) -> frozenset[str]:
        """Those of `keys` that Redis holds, in one round trip. It reads no value, and evicts none the later for it:
        EXISTS touches nothing."""
        return await self._guarded(lambda: self._exist(keys)) or frozenset()

    async def put(self, values: Mapping[str, bytes]) -> dict[str, bytes]:
        """Store what fits. The first writer of a key wins, and what it wrote is returned for the keys that others won.

        So all replicas use the same bits, even where two of them encoded one unit at the same time.
        """
        sealed = {key: seal(self._prefix + key, value) for key, value in values.items()}
        fitting = {key: value for key, value in sealed.items() if len(value) <= self._settings.max_value_bytes}
        return await self._guarded(lambda: self._write(fitting)) or {} if fitting else {}

    async def claim(self, keys: Sequence[str], seconds: float) -> Claimed | None:
        """Take the leases that nobody holds, and look once more, in one round trip; None where Redis is away.

        The look comes after the taking: a holder stores before it lets go, so that who gets a lease after it sees its
        value too.
        """
        return await self._guarded(lambda: self._claim(keys, seconds))

    async def release(self, keys: Sequence[str], token: str) -> None:
        """Let go of those leases that are still the caller's."""
        await self._guarded(lambda: self._release(keys=[self._lease(key) for key in keys], args=[token]))

    def hear_away(self) -> None:
        """Another process found Redis away: that is believed, and not waited for once more, unless Redis has answered
        here within the time that one waits for it."""
        if time.monotonic() - self._answered_at >= self._settings.timeout_s and self._breaker.trip():
            self._release_waiting()

    async def close(self) -> None:
        await self._client.aclose()

    def _name(self, key: str) -> str:
        return PREFIX + self._prefix + key

    def _lease(self, key: str) -> str:
        return LEASE_PREFIX + self._prefix + key

    async def _read(self, keys: Sequence[str]) -> dict[str, bytes]:
        return self._unsealed(keys, await self._client.mget([self._name(key) for key in keys]))

    async def _exist(self, keys: Sequence[str]) -> frozenset[str]:
        pipeline = self._client.pipeline(transaction=False)
        for key in keys:
            pipeline.exists(self._name(key))
        return frozenset(key for key, held in zip(keys, await pipeline.execute(), strict=True) if held)

    def _unsealed(self, keys: Sequence[str], values: Sequence[object]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for key, sealed in zip(keys, values, strict=True):
            if sealed is None:
                continue
            value = unseal(self._prefix + key, sealed) if isinstance(sealed, bytes) else None
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
            pipeline.set(self._name(key), value, nx=nx, px=max(1, int(self._settings.ttl_s * 1000)))
        return list(await pipeline.execute()) if sealed else []

    async def _claim(self, keys: Sequence[str], seconds: float) -> Claimed:
        token = secrets.token_hex(8)
        pipeline = self._client.pipeline(transaction=False)
        for key in keys:
            pipeline.set(self._lease(key), token, nx=True, px=max(1, int(seconds * 1000)))
        pipeline.mget([self._name(key) for key in keys])
        *taken, values = await pipeline.execute()
        won = frozenset(key for key, mine in zip(keys, taken, strict=True) if mine)
        return Claimed(token, won, self._unsealed(keys, values))

    async def _guarded(self, call: Callable[[], Awaitable[T]]) -> T | None:
        """The answer, or None where there is none. All the calls together pay for one outage at most one timeout."""
        ticket = self._breaker.enter()
        if ticket is None:
            return None
        try:
            answer = await self._in_time(call)
        except _Crowded:
            self._breaker.gave_up(ticket)
            self._metrics.inc("tandem_cache_errors_total", kind="crowded")
        except (TimeoutError, redis.exceptions.TimeoutError):
            self._fail(ticket, "timeout")
        except ResponseError as error:
            # It answered, and at once: nothing to rest from.
            self._answered(ticket)
            self._refused(error)
        except (RedisError, OSError):
            self._fail(ticket, "down")
        except BaseException:
            self._breaker.gave_up(ticket)
            raise
        else:
            self._answered(ticket)
            return answer
        return None

    def _answered(self, ticket: int) -> None:
        self._answered_at = time.monotonic()
        self._breaker.succeeded(ticket)

    async def _in_time(self, call: Callable[[], Awaitable[T]]) -> T:
        """Two clocks of `timeout_s`: one for the turn, whose end says nothing about Redis, and one for the call."""
        loop, timeout_s = asyncio.get_running_loop(), self._settings.timeout_s
        limit = asyncio.timeout(timeout_s)
        mine = False
        try:
            async with limit:
                self._limits.add(limit)
                async with self._turns:
                    mine = True
                    limit.reschedule(loop.time() + timeout_s)
                    return await call()
        except TimeoutError:
            if mine or self._breaker.state is not BreakerState.CLOSED:
                raise
            raise _Crowded from None
        finally:
            self._limits.discard(limit)

    def _fail(self, ticket: int, kind: str) -> None:
        if not self._breaker.failed(ticket):
            return
        self._metrics.inc("tandem_cache_errors_total", kind=kind)
        log.warning("the cache Redis is not used for %.0f s (%s); see cache.redis_url", self._pause_s, kind)
        self._release_waiting()

    def _release_waiting(self) -> None:
        """What one call has learned the others need not wait for."""
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(now)

    def _refused(self, error: ResponseError) -> None:
        kind = "full" if isinstance(error, OutOfMemoryError) else "refused"
        self._metrics.inc("tandem_cache_errors_total", kind=kind)
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + _QUIET_S
            log.warning("the cache Redis refuses a command (%s)", type(error).__name__)

    def _note_state(self, state: BreakerState) -> None:
        if state is not BreakerState.HALF_OPEN:  # a probe has to answer first
            self.tell()


def _checksum(key: str, value: bytes) -> bytes:
    """CRC-32 finds every flipped bit and every burst of up to 32, and is five times as fast as BLAKE2 over the
    value: 0.6 ms for T5's 4 MiB. The hash over it binds it to length and key.
    """
    return hashlib.blake2b(
        zlib.crc32(value).to_bytes(4) + len(value).to_bytes(8), digest_size=CHECKSUM_BYTES, key=key.encode()
    ).digest()
