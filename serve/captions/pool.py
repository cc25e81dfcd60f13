"""One replica of the pool that describes pictures, without the framework that carries it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from serve.captions.describer import Describer
from serve.captions.messages import Ask, Caption
from serve.encoders.coalesce import Coalescer
from serve.errors import BackendUnavailable, DeviceLost, OutOfMemory
from serve.telemetry.metrics import Metrics


class CaptionPool:
    """Pictures in, captions out: those that wait together share a batch. A batch that fails, for lack of memory or for
    one bad picture in it, is tried again in halves.

    `lost` says that the device is broken: nothing is described here any more.

    Owns: the model, and the queue in front of it.
    """

    def __init__(self, describer: Describer, max_batch_size: int, metrics: Metrics) -> None:
        self.lost = False
        self._describer = describer
        self._metrics = metrics
        self._busy_since: float | None = None
        self._queue: Coalescer[Ask, Caption] = Coalescer(
            self.describe_batch,
            length=lambda _: 1,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_size,
            fatal=(DeviceLost,),
        )

    async def caption(self, ask: Ask) -> Caption:
        """A caller that is cancelled takes the picture out of the queue, unless another waits for it.

        Raises InvalidRequest; BackendUnavailable where there is not enough memory even for it alone; GenerationFailed,
        DeviceLost.
        """
        self._describer.check(ask)
        began = time.perf_counter()
        try:
            (caption,) = await self._queue.submit_all([ask])
        except OutOfMemory as error:
            raise BackendUnavailable(error.message, None, 1.0) from None
        self._metrics.observe("tandem_caption_seconds", time.perf_counter() - began)
        return caption

    def describe_batch(self, asks: Sequence[Ask]) -> list[Caption]:
        """Blocks; one caller at a time. Raises GenerationFailed."""
        if self.lost:
            raise DeviceLost("the captions pool: the device failed")
        self._busy_since = time.perf_counter()
        try:
            captions = self._describer.describe(asks)
        except DeviceLost:
            self.lost = True
            raise
        finally:
            self._busy_since = None
        self._metrics.inc("tandem_captions_total", len(asks))
        self._metrics.observe("tandem_caption_batch_images", len(asks))
        return captions

    @property
    def busy_s(self) -> float:
        """Seconds since the batch under way began; 0 between them."""
        since = self._busy_since
        return 0.0 if since is None else time.perf_counter() - since

    @property
    def waiting(self) -> int:
        """Pictures that wait or are being described."""
        return self._queue.queued_tokens

    async def close(self) -> None:
        await self._queue.close()
