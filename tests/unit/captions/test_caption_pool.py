"""A pool's batches: who shares them, and what is left of one that fails."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from support.captioners import BLIP_POSITIONS, blip_folder, describer_of, picture

from deployments.doors import Order
from serve.captions.describer import Describer
from serve.captions.messages import Ask, Caption
from serve.captions.pool import CaptionPool
from serve.devices import device_errors
from serve.errors import BackendUnavailable, DeviceLost, InvalidRequest
from serve.settings.pools import CaptionSettings
from serve.telemetry.metrics import InProcessMetrics

ASKS = [Ask(picture(colour), "", 4) for colour in ("red", "blue", "green", "orange")]


@pytest.fixture(scope="module")
def describer(tmp_path_factory: pytest.TempPathFactory) -> Describer:
    return describer_of(CaptionSettings(source=str(blip_folder(tmp_path_factory.mktemp("blip")))))


class Card(Describer):
    """A device with room for `room` pictures at a time, which may break. While `gate` is shut it says in `reached` that
    a batch has begun, and goes no further."""

    def __init__(self, describer: Describer, room: int = 4) -> None:
        self.__dict__.update(describer.__dict__)
        self.room = room
        self.broken = False
        self.batches: list[int] = []
        self.gate, self.reached = Event(), Event()
        self.gate.set()

    def describe(self, asks: Sequence[Ask]) -> list[Caption]:
        self.batches.append(len(asks))
        self.reached.set()
        assert self.gate.wait(60)
        with device_errors("the captions pool"):
            if self.broken:
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
            if len(asks) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return super().describe(asks)


def held(card: Card, test: Callable[[CaptionPool, InProcessMetrics], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        metrics = InProcessMetrics()
        pool = CaptionPool(card, 4, metrics)
        await test(pool, metrics)
        assert (pool.waiting, pool.busy_s) == (0, 0.0)
        await pool.close()

    asyncio.run(main())


def test_what_waits_together_goes_together(describer: Describer) -> None:
    card = Card(describer)

    async def test(pool: CaptionPool, metrics: InProcessMetrics) -> None:
        told = await asyncio.gather(*map(pool.caption, ASKS))
        assert told == describer.describe(ASKS)
        assert card.batches == [4]
        assert metrics.value("tandem_captions_total") == 4

    held(card, test)


def test_a_batch_that_does_not_fit_is_halved(describer: Describer) -> None:
    card = Card(describer, room=2)

    async def test(pool: CaptionPool, _: InProcessMetrics) -> None:
        assert await asyncio.gather(*map(pool.caption, ASKS)) == describer.describe(ASKS)
        assert card.batches == [4, 2, 2]

    held(card, test)


def test_what_does_not_fit_alone_is_to_be_tried_later(describer: Describer) -> None:
    async def test(pool: CaptionPool, metrics: InProcessMetrics) -> None:
        with pytest.raises(BackendUnavailable, match="memory") as refused:
            await pool.caption(ASKS[0])
        assert refused.value.retry_after_s
        assert not pool.lost
        assert metrics.value("tandem_captions_total") == 0

    held(Card(describer, room=0), test)


def test_a_broken_device_is_not_asked_again(describer: Describer) -> None:
    card = Card(describer)
    card.broken = True

    async def test(pool: CaptionPool, _: InProcessMetrics) -> None:
        for each in ASKS[:2]:
            with pytest.raises(DeviceLost):
                await pool.caption(each)
        assert pool.lost
        assert card.batches == [1]
        order = Order(lambda: pool.caption(ASKS[0]), "the captions pool")
        order.start()
        with pytest.raises(BackendUnavailable, match="being replaced"):
            await order.answer()

    held(card, test)


def test_one_caller_s_picture_is_described_once_and_tenants_share_nothing(describer: Describer) -> None:
    card = Card(describer)

    async def test(pool: CaptionPool, _: InProcessMetrics) -> None:
        await asyncio.gather(*(pool.caption(ASKS[0]) for _ in range(3)))
        assert card.batches == [1]
        await asyncio.gather(*(pool.caption(replace(ASKS[0], salt=salt)) for salt in ("a", "b")))
        assert card.batches == [1, 2]

    held(card, test)


def test_a_picture_that_nobody_waits_for_is_not_described(describer: Describer) -> None:
    """Whoever leaves while another's batch is computed takes the picture along."""
    card = Card(describer)
    card.gate.clear()

    async def test(pool: CaptionPool, metrics: InProcessMetrics) -> None:
        first = asyncio.create_task(pool.caption(ASKS[0]))
        await asyncio.to_thread(card.reached.wait, 60)
        others = [asyncio.create_task(pool.caption(each)) for each in ASKS[1:]]
        await asyncio.sleep(0)
        others[0].cancel()
        card.gate.set()
        told = await asyncio.gather(first, *others[1:])
        assert told == describer.describe([ASKS[0], *ASKS[2:]])
        assert card.batches == [1, 2]

    held(card, test)


def test_a_prompt_that_is_too_long_fails_alone(describer: Describer) -> None:
    async def test(pool: CaptionPool, metrics: InProcessMetrics) -> None:
        long = replace(ASKS[0], prompt="a " * BLIP_POSITIONS)
        told = await asyncio.gather(*map(pool.caption, [*ASKS[:3], long]), return_exceptions=True)
        assert told[:3] == describer.describe(ASKS[:3])
        assert isinstance(told[3], InvalidRequest)
        assert metrics.value("tandem_captions_total") == 3

    held(Card(describer), test)


def test_a_prompt_that_is_refused_costs_nothing(describer: Describer, tmp_path: Path) -> None:
    card = Card(describer)

    async def test(pool: CaptionPool, _: InProcessMetrics) -> None:
        with pytest.raises(InvalidRequest):
            await pool.caption(replace(ASKS[0], prompt="a [SEP]"))
        assert card.batches == []

    held(card, test)
