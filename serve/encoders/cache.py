"""Embeddings by unit: this process's memory, then Redis, then whoever can encode. Bytes only, no torch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from serve.domain.text import CacheReport, EncodeUnit, Tier
from serve.encoders.flights import Flight, Flights
from serve.encoders.leases import Claims, Leases
from serve.encoders.lru import ByteLru
from serve.encoders.redis_tier import PAUSE_S, RedisTier
from serve.encoders.together import Together
from serve.settings.stores import CacheSettings
from serve.telemetry.metrics import Metrics


class Fetched(NamedTuple):
    """A packed embedding, and where it came from."""

    value: bytes
    tier: Tier


Fetch = Callable[[Sequence[EncodeUnit]], Awaitable[Sequence[Fetched]]]
"""The tier below: one result per unit, in order. It is asked for distinct units of one encoder, and for none that it is
asked for already, unless it was cancelled. It is cancelled when nobody waits for any of its units any more."""

RedisState = Literal["up", "away", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """The cache of one process now: entries in memory, their bytes and the most they may be, units on their way, units
    answered since the start by tier, and Redis: `up`, `away` while it is left alone after a failure, `off` without."""

    entries: int
    bytes: int
    capacity: int
    in_flight: int
    hits: CacheReport
    redis: RedisState


class EmbeddingCache:
    """Get embeddings; what is missing is fetched once, however many ask for it at the same time.

    Embeddings are immutable under their key, so that nothing is ever invalidated. The value handed out is the value
    stored, on a miss too. Belongs to one event loop.

    Owns: this process's embeddings in memory, its connections to the cache Redis, the fetches under way.
    """

    def __init__(
        self,
        settings: CacheSettings,
        fetch: Fetch,
        metrics: Metrics,
        *,
        place: str,
        write_through: bool = False,
        private: Collection[str] = (),
        leases: float = 0.0,
        by_row: bool = False,
        pause_s: float = PAUSE_S,
    ) -> None:
        """`place` is the kind of process, a metric's label. `write_through`: write to Redis what was fetched; one kind
        of process does (the encoder pool), not all. `private` are the fingerprints of encoders that don't use Redis.
        `leases` are the seconds for which a unit that is being fetched is held against other processes; 0 is not at
        all. `by_row`: each text is fetched by itself, so that one that nobody waits for any more is given up alone;
        else one fetch has all that a call wants of an encoder. `pause_s` is how long a Redis that failed is left alone.
        """
        self._fetch = fetch
        self._metrics = metrics
        self.place = place
        self._write_through = write_through
        self._private = frozenset(private)
        self._memory = ByteLru(settings.memory_bytes)
        url = settings.redis_url.get_secret_value() if settings.redis_url else None
        self._redis = RedisTier(url, settings, metrics, pause_s=pause_s) if url else None
        self._looks: set[asyncio.Task[Any]] = set()
        self._leases = Leases(self._redis, leases) if self._redis and leases else None
        self._by_row = by_row
        self._flights: Flights[Fetched] = Flights()
        self._hits = dict.fromkeys(Tier, 0)
        self.cleared = 0
        """How often this process was told to forget what it has."""

    async def get_many(self, units: Sequence[EncodeUnit]) -> dict[str, Fetched]:
        """By unit key. Raises what the fetch raised, to everyone who waited for that unit; the next call tries again.

        A caller that is cancelled leaves the fetch running for the others, and ends it where there are none.
        """
        wanted = {unit.key: unit for unit in units}
        found = {key: Fetched(value, Tier.MEMORY) for key in wanted if (value := self._memory.get(key)) is not None}
        if len(found) < len(wanted):
            absent = [key for key in wanted if key not in found]
            self._launch([wanted[key] for key in absent if key not in self._flights])
            found |= await self._flights.join(absent)
            found = {key: found[key] for key in wanted}
        for got in found.values():
            self._hits[got.tier] += 1
        return found

    async def look(self, units: Sequence[EncodeUnit]) -> dict[str, Tier]:
        """Where each unit could be had from now, by its key: this process's memory, Redis, or an encoder. Nothing is
        loaded, and it counts as no use. A Redis that is away has nothing."""
        found = {unit.key: Tier.MEMORY if unit.key in self._memory else Tier.ENCODED for unit in units}
        asked = [unit.key for unit in units if found[unit.key] is Tier.ENCODED and self._shares(unit)]
        if self._redis is not None and asked:
            found |= dict.fromkeys(await self._redis.has(asked), Tier.REDIS)
        return found

    def adopt(self, values: Mapping[EncodeUnit, bytes]) -> None:
        """Take by-products: embeddings that came out of a forward which somebody wanted for another unit.

        Without Redis they are in memory at once; else they are stored first, in the background, so that all processes
        use the same bits, and who asks meanwhile waits for that.
        """
        fresh: dict[str, EncodeUnit] = {}
        taken: dict[str, Fetched] = {}
        for unit, value in values.items():
            key, got = unit.key, Fetched(value, Tier.MEMORY)
            if not self._flights.offer(key, got) and key not in self._memory:
                fresh[key], taken[key] = unit, got
        stored = {key for key in fresh if self._stores(fresh[key])}
        self._keep({key: got for key, got in taken.items() if key not in stored})
        if stored:
            later = {key: taken[key] for key in stored}
            self._flights.launch(later, partial(self._settle, fresh, later), pinned=True)

    @property
    def redis_away(self) -> bool:
        """Redis has failed here and is left alone; the next process that is asked need not find that out by waiting."""
        return self._redis is not None and self._redis.away

    def shared(self, unit: EncodeUnit) -> bool:
        """Whether what one process has of it, all find: through Redis, unless that is away."""
        return self._shares(unit) and not self.redis_away

    def hear_redis_away(self) -> None:
        """What another process says of the same Redis."""
        if self._redis:
            self._redis.hear_away()

    def stats(self) -> CacheStats:
        if self._redis:
            self._redis.tell()
        return CacheStats(
            entries=len(self._memory),
            bytes=self._memory.bytes,
            capacity=self._memory.capacity,
            in_flight=len(self._flights),
            hits=CacheReport(**{tier.value: count for tier, count in self._hits.items()}),
            redis=self._redis_state(),
        )

    def clear(self) -> None:
        """Forget what is in memory. Fetches under way go on."""
        self.cleared += 1
        self._memory.clear()
        self._gauge()

    def check_integrity(self) -> None:
        self._memory.check_integrity()
        self._flights.check_integrity()

    async def close(self) -> None:
        """Ends the fetches under way: whoever still waits for one is cancelled."""
        await self._flights.close()
        await asyncio.gather(*self._looks, return_exceptions=True)
        if self._leases:
            await self._leases.close()
        if self._redis:
            await self._redis.close()

    def _launch(self, units: Sequence[EncodeUnit]) -> None:
        """A flight for each part that is fetched by itself: strangers may want one, and must not wait for another. They
        ask Redis together."""
        look = Together(self._redis.get, self._looks) if self._redis else None
        claims = self._leases.claims() if self._leases else None
        parts: dict[Hashable, dict[str, EncodeUnit]] = {}
        for unit in units:
            row = unit.encoder, unit.token_ids, unit.concepts, unit.hidden, unit.salt
            part = row if self._by_row else unit.encoder
            parts.setdefault(part, {})[unit.key] = unit
        for wanted in parts.values():
            self._flights.launch(wanted, partial(self._load, wanted, look, claims))

    async def _load(
        self,
        units: Mapping[str, EncodeUnit],
        look: Together[dict[str, bytes]] | None,
        claims: Claims | None,
        flight: Flight[Fetched],
    ) -> None:
        """`units` are of one encoder."""
        absent = list(units)
        shared = all(map(self._shares, units.values()))
        found, encode = partial(self._found, flight), partial(self._encode, units, flight)
        if look and shared:
            stored = await asyncio.shield(look.ask(absent))
            found({key: stored[key] for key in units if key in stored})
            absent = [key for key in units if key not in stored]
        if absent and self._leases and claims and shared:
            await self._leases.fill(absent, claims, encode, found)
        elif absent:
            await encode(absent)

    async def _encode(self, units: Mapping[str, EncodeUnit], flight: Flight[Fetched], keys: Sequence[str]) -> None:
        wanted = [key for key in keys if key not in flight.offered]
        answers = await self._fetch([units[key] for key in wanted]) if wanted else ()
        fetched = dict(zip(wanted, answers, strict=True))
        # A by-product may have come meanwhile. Either value is right; the first is kept.
        fetched |= {key: flight.offered[key] for key in keys if key in flight.offered}
        await self._settle(units, fetched, flight)

    async def _settle(
        self, units: Mapping[str, EncodeUnit], fetched: Mapping[str, Fetched], flight: Flight[Fetched]
    ) -> None:
        """Store, and keep what is stored: where another process was first, its value."""
        settled = dict(fetched)
        with self._flights.held(flight):  # it is paid for: it is stored even where the last caller leaves now
            if self._redis and (values := {key: got.value for key, got in fetched.items() if self._stores(units[key])}):
                earlier = await self._redis.put(values)
                settled |= {key: Fetched(value, fetched[key].tier) for key, value in earlier.items()}
            self._keep(settled)
            self._flights.land(flight, settled)

    def _found(self, flight: Flight[Fetched], stored: Mapping[str, bytes]) -> None:
        loaded = {key: Fetched(value, Tier.REDIS) for key, value in stored.items()}
        self._keep(loaded)
        self._flights.land(flight, loaded)

    def _shares(self, unit: EncodeUnit) -> bool:
        return self._redis is not None and unit.encoder not in self._private

    def _stores(self, unit: EncodeUnit) -> bool:
        return self._write_through and self._shares(unit)

    def _keep(self, loaded: Mapping[str, Fetched]) -> None:
        for key, got in loaded.items():
            self._memory.put(key, got.value)
        if loaded:
            self._gauge()

    def _gauge(self) -> None:
        self._metrics.set("tandem_cache_entries", len(self._memory), place=self.place)
        self._metrics.set("tandem_cache_bytes", self._memory.bytes, place=self.place)

    def _redis_state(self) -> RedisState:
        if self._redis is None:
            return "off"
        return "away" if self._redis.away else "up"
