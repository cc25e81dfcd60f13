import asyncio

import pytest
import torch

from serve.domain import EncodeUnit, Tier
from serve.encoders.codec import pack, unpack
from serve.encoders.forward import TextTower
from serve.encoders.pool import EncoderPool
from serve.errors import BackendUnavailable
from serve.settings import EncoderSettings, Settings
from serve.telemetry.metrics import InProcessMetrics


def make(tower: TextTower, max_batch_size: int = 32) -> tuple[EncoderPool, InProcessMetrics]:
    metrics = InProcessMetrics()
    return EncoderPool(tower, Settings(encoder=EncoderSettings(max_batch_size=max_batch_size)), metrics), metrics


def test_both_sides_share_one_forward_and_other_weights_need_none(tower: TextTower, plan) -> None:
    async def main() -> None:
        pool, metrics = make(tower)
        first = await pool.encode(plan("a (red:1.5) circle", "blurry").units)
        assert [got.tier for got in first] == [Tier.ENCODED] * 2
        assert metrics.value("tandem_encoder_forwards_total") == 1
        assert metrics.value("tandem_encoder_forward_rows_total") == 2
        again = await pool.encode(plan("a [red] (circle:0.3)", "(blurry:1.2)").units)
        assert [got.tier for got in again] == [Tier.MEMORY] * 2
        assert [got.value for got in again] == [got.value for got in first]
        assert metrics.value("tandem_encoder_forwards_total") == 1
        await pool.close()

    asyncio.run(main())


def test_a_hundred_simultaneous_misses_are_one_forward(tower: TextTower, units: list[EncodeUnit]) -> None:
    async def main() -> None:
        pool, metrics = make(tower)
        results = await asyncio.gather(*(pool.encode(units[:2]) for _ in range(100)))
        assert metrics.value("tandem_encoder_forwards_total") == 1
        assert metrics.value("tandem_encoder_batch_rows") == 1
        assert metrics.value("tandem_encoder_forward_rows_total") == 2
        assert all(result == results[0] for result in results)
        await pool.close()

    asyncio.run(main())


def test_a_hundred_different_prompts_are_few_forwards(tower: TextTower, units: list[EncodeUnit]) -> None:
    async def main() -> None:
        pool, metrics = make(tower, max_batch_size=32)
        results = await asyncio.gather(*(pool.encode([unit]) for unit in units))
        assert metrics.value("tandem_encoder_forward_rows_total") == 100
        assert metrics.value("tandem_encoder_forwards_total") <= 6
        for unit, (got,) in zip(units[:10], results, strict=False):
            (alone,) = tower.encode([unit])
            assert torch.allclose(unpack(got.value), alone, atol=1e-5, rtol=0)
        await pool.close()

    asyncio.run(main())


def test_plain_encode_batch(tower: TextTower, units: list[EncodeUnit]) -> None:
    pool, _ = make(tower)
    values = pool.encode_batch([units[3], units[4], units[3]])
    assert values == [pack(row) for row in tower.encode([units[3], units[4], units[3]])]


def test_units_of_another_encoder_are_not_encoded_by_this_one(tower: TextTower, units: list[EncodeUnit]) -> None:
    async def main() -> None:
        pool, metrics = make(tower)
        foreign = EncodeUnit("another encoder", units[0].token_ids)
        with pytest.raises(BackendUnavailable) as raised:
            await pool.encode([foreign])
        assert raised.value.retry_after_s == 1.0
        assert metrics.value("tandem_encoder_forwards_total") == 0
        assert len(await pool.encode(units[:1])) == 1
        await pool.close()

    asyncio.run(main())
