"""The pool that describes pictures."""

from __future__ import annotations

import asyncio

from ray import serve

from deployments.doors import Order
from deployments.metrics import RayMetrics, tell_device
from serve.captions.describer import Describer
from serve.captions.messages import Ask, Caption
from serve.captions.pool import CaptionPool
from serve.devices import claim_device, use_threads
from serve.errors import OperatorError
from serve.models.captioner import captioner_of
from serve.settings.tree import Settings
from serve.telemetry import logs


class Captions:
    """Pictures in, captions out.

    Owns: the model's weights in this process, through its CaptionPool.
    """

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        logs.configure(settings.log.level)
        own = settings.captions
        folder = await asyncio.to_thread(captioner_of, own)
        if folder is None:
            raise OperatorError("captions.source: it is empty", "captions.source")
        device = claim_device(own.place, own.num_gpus, "captions.device")
        if device.type == "cpu":
            use_threads(own.torch_threads)
        describer = await asyncio.to_thread(Describer.load, folder, own, device)
        self._stall_s = own.stall_s
        self._model = folder.name
        self._metrics = RayMetrics(gpu_class=own.gpu_class)
        self._pool = CaptionPool(describer, own.max_batch_size, self._metrics)
        self._door.set_max_batch_size(own.max_batch_size)
        self._door.set_batch_wait_timeout_s(own.batch_wait_s)

    async def caption(self, ask: Ask) -> Caption:
        """Raises as `CaptionPool.caption` does; BackendUnavailable where the device is broken."""
        order = Order(lambda: self._pool.caption(ask), "the captions pool")
        try:
            await self._door(order)
            return await order.answer()
        finally:
            order.withdraw()

    @serve.batch  # type: ignore[untyped-decorator]
    async def _door(self, orders: list[Order[Caption]]) -> list[None]:
        """What came together starts together. It waits for no order, which may be cancelled: a CancelledError in here
        would leave the others without an answer."""
        for order in orders:
            order.start()
        return [None] * len(orders)

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self._pool.lost:
            raise RuntimeError("the device failed")
        self._metrics.tell_again()
        tell_device(self._metrics, "captions")
        if self._pool.busy_s > self._stall_s:
            raise RuntimeError(f"a batch has taken more than {self._stall_s:.0f} s")

    def describe(self) -> str:
        return f"{self._model}, {self._pool.waiting} waiting"

    async def __del__(self) -> None:
        """Serve awaits this before it ends the process."""
        await self._pool.close()
