"""One text encoder's pool."""

from __future__ import annotations

import asyncio
import time

from ray import serve

from deployments.doors import Order
from deployments.metrics import RayMetrics, tell_device
from deployments.parts import cache_url, check_urls
from serve.catalog import open_catalog
from serve.devices import claim_device, use_threads
from serve.domain.text import EncodeUnit, Tier
from serve.encoders.cache import Fetched
from serve.encoders.census import CensusTaker
from serve.encoders.forward import TextTower
from serve.encoders.pool import EncoderPool, PoolLoad
from serve.settings.tree import Settings
from serve.telemetry import logs

DOOR = 256
"""Requests that may come in together, and so the fewest that a replica takes at once: most are answered from memory,
and must not queue behind a few that wait for a forward."""


class TextEncoder:
    """Units in, embeddings out; what is cached anywhere is not encoded again.

    Owns: one encoder's weights in this process, through its EncoderPool.
    """

    async def __init__(self, settings: Settings, name: str) -> None:  # type: ignore[misc]  # Serve awaits it
        logs.configure(settings.log.level)
        check_urls(settings)
        catalog = await asyncio.to_thread(open_catalog, settings)
        encoder = catalog.registry.named(name)
        own = encoder.settings
        device = claim_device(own.place, own.num_gpus, encoder.setting("device"))
        if device.type == "cpu" and own.torch_threads:
            use_threads(own.torch_threads)
        tower = await asyncio.to_thread(TextTower.load, encoder, device.type, catalog.concepts)
        self._stall_s = own.stall_s
        self._metrics = RayMetrics(gpu_class=own.gpu_class)
        self._pool = EncoderPool(tower, encoder, settings, self._metrics)
        self._census = CensusTaker(self._pool.cache, cache_url(settings), name)
        self._census.start()
        self._told: tuple[float, PoolLoad] = time.monotonic(), self._pool.load

    async def encode(self, units: list[EncodeUnit], redis_away: bool = False) -> list[Fetched]:
        """Embeddings in the order of `units`. Raises BackendUnavailable for units of another encoder.

        `redis_away`: the caller has just found the cache Redis away.
        """
        order = Order(lambda: self._pool.encode(units, redis_away), "this text encoder")
        try:
            await self._door(order)
            return await order.answer()
        finally:
            order.withdraw()

    async def prepare(self, units: list[EncodeUnit], redis_away: bool = False) -> list[Tier]:
        """Have the units encoded and kept, without sending them anywhere; where they were."""
        return [got.tier for got in await self.encode(units, redis_away)]

    @serve.batch(max_batch_size=DOOR, batch_wait_timeout_s=0.0)  # type: ignore[untyped-decorator]
    async def _door(self, orders: list[Order[list[Fetched]]]) -> list[None]:
        """What has arrived starts together, so that its misses share a forward.

        The door waits for nothing: not for more to come, which would cost an idle pool its wait; not for a batch,
        which would make the batches behind it small; and not for an order that may be cancelled, because a
        CancelledError in here would leave the others without an answer. The pool's queue cuts the batches.
        """
        for order in orders:
            order.start()
        return [None] * len(orders)

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self._pool.lost:
            raise RuntimeError("the device failed")
        self._metrics.tell_again()
        tell_device(self._metrics, "text-encoder")
        if self._pool.busy_s > self._stall_s:
            raise RuntimeError(f"a forward has taken more than {self._stall_s:.0f} s")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve calls this about once a second; `autoscaling.ReplicaLoad` says what the figures are."""
        (then, before), (now, load) = self._told, (time.monotonic(), self._pool.load)
        self._told = now, load
        passed_s = max(now - then, 1e-3)
        return {
            "queued_tokens": float(load.queued_tokens),
            "busy": (load.forward_s - before.forward_s) / passed_s,
            "requests": (load.requests - before.requests) / passed_s,
        }

    def describe(self) -> str:
        stats = self._pool.cache.stats()
        return f"{stats.entries} units in memory, {stats.bytes / 1e6:.0f} MB"

    async def __del__(self) -> None:
        """Serve awaits this before it ends the process."""
        await self._census.close()
        await self._pool.close()
