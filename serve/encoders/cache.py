"""Embeddings by unit: this process's memory, then Redis, then whoever can encode. Bytes only, no torch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serve.domain import EncodeUnit, Tier
from serve.encoders.lru import ByteLru
from serve.encoders.redis_tier import RedisTier
from serve.settings import CacheSettings
from serve.telemetry.metrics import Metrics


class Fetched(NamedTuple):
    """A packed embedding, and where it came from."""

    value: bytes
    tier: Tier


Fetch = Callable[[Sequence[EncodeUnit]], Awaitable[Sequence[Fetched]]]
"""The tier below: one result per unit, in order. It is asked for distinct units, and never for one twice at once."""


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The memory tier now: entries, their bytes, units on their way."""

    entries: int
    bytes: int
    in_flight: int


class EmbeddingCache:
    """Get embeddings; what is missing is fetched once, however many ask for it at the same time.

    Embeddings are immutable under their key, so that nothing is ever invalidated. The value handed out is the value
    stored, on a miss too. Belongs to one event loop.

    Owns: this process's embeddings in memory, its connections to the cache Redis, the fetches under way.
    """

    def __init__(self, settings: CacheSettings, fetch: Fetch, metrics: Metrics, *, write_through: bool = False) -> None:
        """`write_through`: write to Redis what was fetched. One kind of process does (the encoder pool), not all."""
        self._fetch = fetch
        self._metrics = metrics
        self._write_through = write_through
        self._memory = ByteLru(settings.memory_bytes)
        url = settings.redis_url
        self._redis = RedisTier(url.get_secret_value(), settings, metrics) if url else None
        self._in_flight: dict[str, asyncio.Task[dict[str, Fetched]]] = {}

    async def get_many(self, units: Sequence[EncodeUnit]) -> dict[str, Fetched]:
        """By unit key. Raises what the fetch raised, to everyone who waited for that unit; the next call tries again.

        A caller that is cancelled leaves the fetch running for the others.
        """
        wanted = {unit.key: unit for unit in units}
        found: dict[str, Fetched] = {}
        missing: dict[str, EncodeUnit] = {}
        for key, unit in wanted.items():
            value = self._memory.get(key)
            if value is not None:
                found[key] = Fetched(value, Tier.MEMORY)
            elif key not in self._in_flight:
                missing[key] = unit
        if missing:
            self._take_off(missing)
        for key, task in [(key, self._in_flight[key]) for key in wanted if key not in found]:
            found[key] = (await asyncio.shield(task))[key]
        for got in found.values():
            self._metrics.inc("tandem_cache_units_total", tier=got.tier)
        return {key: found[key] for key in wanted}

    def stats(self) -> CacheStats:
        return CacheStats(len(self._memory), self._memory.bytes, len(self._in_flight))

    def check_integrity(self) -> None:
        self._memory.check_integrity()

    async def close(self) -> None:
        """Ends the fetches under way: whoever still waits for one is cancelled."""
        for task in set(self._in_flight.values()):
            task.cancel()
        if self._redis:
            await self._redis.close()

    def _take_off(self, missing: Mapping[str, EncodeUnit]) -> None:
        task = asyncio.create_task(self._load(missing))

        def land(done: asyncio.Task[dict[str, Fetched]]) -> None:
            for key in missing:
                del self._in_flight[key]
            if not done.cancelled():
                done.exception()  # every waiter may be gone, and then nobody else looks at it

        self._in_flight.update(dict.fromkeys(missing, task))
        task.add_done_callback(land)

    async def _load(self, missing: Mapping[str, EncodeUnit]) -> dict[str, Fetched]:
        stored = await self._redis.get(list(missing)) if self._redis else {}
        loaded = {key: Fetched(value, Tier.REDIS) for key, value in stored.items()}
        if absent := [key for key in missing if key not in loaded]:
            fetched = dict(zip(absent, await self._fetch([missing[key] for key in absent]), strict=True))
            if self._redis and self._write_through:
                earlier = await self._redis.put({key: got.value for key, got in fetched.items()})
                fetched |= {key: Fetched(value, fetched[key].tier) for key, value in earlier.items()}
            loaded |= fetched
        for key, got in loaded.items():
            self._memory.put(key, got.value)
        return loaded
