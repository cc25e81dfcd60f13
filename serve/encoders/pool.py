"""One replica of the text-encoder pool, without the framework that carries it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from serve.domain import EncodeUnit, Tier
from serve.encoders.cache import CacheStats, EmbeddingCache, Fetched
from serve.encoders.coalesce import Coalescer
from serve.encoders.codec import pack
from serve.encoders.forward import TextTower
from serve.errors import BackendUnavailable
from serve.settings import Settings
from serve.telemetry.metrics import Metrics


class EncoderPool:
    """Units in, packed embeddings out: cached where anyone has encoded them, else in one forward with all that waits.

    Owns: the text tower, the cache in front of it (the one that writes to Redis), the queue between the two.
    """

    def __init__(self, tower: TextTower, settings: Settings, metrics: Metrics) -> None:
        self._tower = tower
        self._metrics = metrics
        self._busy_since: float | None = None
        self._queue: Coalescer[EncodeUnit, bytes] = Coalescer(self.encode_batch, settings.encoder.max_batch_size)
        self._cache = EmbeddingCache(settings.cache, self._fetch, metrics, write_through=True)

    async def encode(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
        """In the order of `units`. Raises what `check` raises."""
        self.check(units)
        return (await self.encode_many([units]))[0]

    async def encode_many(self, requests: Sequence[Sequence[EncodeUnit]]) -> list[list[Fetched]]:
        """Several requests as one: a single look-up, and their misses share a forward. `check` them first."""
        found = await self._cache.get_many([unit for units in requests for unit in units])
        return [[found[unit.key] for unit in units] for units in requests]

    def check(self, units: Sequence[EncodeUnit]) -> None:
        """BackendUnavailable for a unit of another encoder. During a rollout they arrive here, and our embedding must
        not be stored under their key."""
        if any(unit.encoder != self._tower.fingerprint for unit in units):
            raise BackendUnavailable("this text encoder serves another model", "model", 1.0)

    def encode_batch(self, units: list[EncodeUnit]) -> list[bytes]:
        """One forward, no cache. Blocks; one caller at a time."""
        started = self._busy_since = time.perf_counter()
        rows = self._tower.rows
        try:
            packed = [pack(tensor) for tensor in self._tower.encode(units)]
        finally:
            self._busy_since = None
        self._metrics.inc("tandem_encoder_forwards_total")
        self._metrics.inc("tandem_encoder_forward_rows_total", self._tower.rows - rows)
        self._metrics.observe("tandem_encoder_batch_rows", self._tower.rows - rows)
        self._metrics.observe("tandem_encoder_forward_seconds", time.perf_counter() - started)
        return packed

    @property
    def busy_s(self) -> float:
        """Seconds since the forward under way began; 0 between them."""
        since = self._busy_since
        return 0.0 if since is None else time.perf_counter() - since

    def stats(self) -> CacheStats:
        return self._cache.stats()

    async def close(self) -> None:
        await self._queue.close()
        await self._cache.close()

    async def _fetch(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
        return [Fetched(value, Tier.ENCODED) for value in await self._queue.submit_all(units)]
