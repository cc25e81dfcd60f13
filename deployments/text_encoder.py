"""The text-encoder pool."""

from __future__ import annotations

import asyncio

from ray import serve

from deployments.metrics import RayMetrics
from serve.devices import claim_device
from serve.domain import EncodeUnit
from serve.encoders.cache import Fetched
from serve.encoders.forward import TextTower
from serve.encoders.pool import EncoderPool
from serve.models import resolve
from serve.settings import Settings
from serve.telemetry import logs


class TextEncoder:
    """Units in, embeddings out; what is cached anywhere is not encoded again.

    Owns: the text tower's weights in this process, through its EncoderPool.
    """

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        logs.configure(settings.log.level)
        model = await asyncio.to_thread(resolve, settings.model, settings.data_dir)
        encoder = settings.encoder
        device = claim_device(encoder.place, encoder.num_gpus, "encoder.device")
        tower = await asyncio.to_thread(TextTower.load, model.path, device.type, encoder.dtype)
        self._stall_s = encoder.stall_s
        self._pool = EncoderPool(tower, settings, RayMetrics())

    async def encode(self, units: list[EncodeUnit]) -> list[Fetched]:
        """Embeddings in the order of `units`. Raises BackendUnavailable for units of another encoder."""
        self._pool.check(units)
        found: list[Fetched] = await self._together(units)
        return found

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0, max_concurrent_batches=8)  # type: ignore[untyped-decorator]
    async def _together(self, requests: list[list[EncodeUnit]]) -> list[list[Fetched]]:
        """The door: requests that arrived together share one look-up and, for what is missing, one forward.

        It never waits for more to come and never holds a request back while a batch runs; the batches of the forward
        are cut behind it, by the pool's queue.
        """
        return await self._pool.encode_many(requests)

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self._pool.busy_s > self._stall_s:
            raise RuntimeError(f"a forward has taken more than {self._stall_s:.0f} s")

    def describe(self) -> str:
        stats = self._pool.stats()
        return f"{stats.entries} units in memory, {stats.bytes / 1e6:.0f} MB"

    async def __del__(self) -> None:
        """Serve awaits this before it ends the process."""
        await self._pool.close()
