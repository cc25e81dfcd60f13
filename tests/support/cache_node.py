"""One process's embedding cache on a real Redis, with an encoder of its own whose results can be told from others'."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import redis
from pydantic import SecretStr

from serve.domain.text import EncodeUnit, Tier
from serve.encoders.cache import EmbeddingCache, Fetched
from serve.encoders.redis_tier import PAUSE_S, PREFIX
from serve.settings.stores import CacheSettings
from serve.telemetry.metrics import InProcessMetrics

UNITS = [EncodeUnit("encoder", (number,)) for number in range(5)]
UNIT = UNITS[0]
_AROUND = {"auth", "client", "config", "hello", "info", "select"}


class Node:
    """`encoded` lists the units that were encoded, in order; `gate` holds the encoder up while it is clear; `error` is
    raised by it. Options that the cache doesn't take are cache settings."""

    def __init__(
        self,
        url: str | None,
        mark: bytes = b"",
        *,
        write_through: bool = True,
        private: tuple[str, ...] = (),
        leases: float = 0.0,
        by_row: bool = False,
        pause_s: float = PAUSE_S,
        **settings: Any,
    ) -> None:
        self.mark = mark
        self.metrics = InProcessMetrics()
        self.encoded: list[EncodeUnit] = []
        self.calls = asyncio.Semaphore(0)
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.cache = EmbeddingCache(
            CacheSettings(redis_url=SecretStr(url) if url else None, **settings),
            self.encode,
            self.metrics,
            place="encoder",
            write_through=write_through,
            private=private,
            leases=leases,
            by_row=by_row,
            pause_s=pause_s,
        )

    async def encode(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
        self.encoded += units
        self.calls.release()
        await self.gate.wait()
        if self.error:
            raise self.error
        return [Fetched(unit.key.encode() + self.mark, Tier.ENCODED) for unit in units]

    async def get(self, unit: EncodeUnit = UNIT) -> Fetched:
        return (await self.cache.get_many([unit]))[unit.key]

    def errors(self, kind: str) -> float:
        return self.metrics.value("tandem_cache_errors_total", kind=kind)


def stored(url: str, unit: EncodeUnit = UNIT) -> bytes | None:
    with redis.Redis.from_url(url) as client:
        return client.get(PREFIX + unit.key)


def commands(url: str) -> dict[str, int]:
    """Calls by command since the server's statistics were last reset, without those that open a connection."""
    with redis.Redis.from_url(url) as client:
        calls = {name.removeprefix("cmdstat_"): each["calls"] for name, each in client.info("commandstats").items()}
    return {name: count for name, count in calls.items() if name not in _AROUND}


async def until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  what is waited for is in another process
            await asyncio.sleep(0.001)
