"""A pool's rows are what they are made of: the same token ids with other concepts or hidden words are other rows."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from support.towers import all_outputs, random_rows

from serve.domain.text import FIRST_CONCEPT_ID, EncodeUnit, Tier
from serve.encoders.codec import unpack
from serve.encoders.forward import Row, TextTower
from serve.encoders.pool import EncoderPool
from serve.encoders.registry import Encoder
from serve.encoders.weights import load_trunk
from serve.errors import BackendUnavailable
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics

ROWS = "tandem_encoder_forward_rows_total"
FORWARDS = "tandem_encoder_forwards_total"


class Table:
    def __init__(self, **concepts: torch.Tensor) -> None:
        self.concepts = concepts

    def vectors(self, digests: Sequence[str]) -> torch.Tensor:
        if not self.concepts.keys() >= set(digests):
            raise BackendUnavailable("no file has it", None, 1.0)
        return torch.cat([self.concepts[digest] for digest in digests])


@pytest.fixture(scope="module")
def encoder(encoders: Mapping[str, Encoder]) -> Encoder:
    return replace(encoders["clip-projected"], outputs=tuple(all_outputs(encoders["clip-projected"])[-3:]))


@pytest.fixture(scope="module")
def tower(encoder: Encoder) -> TextTower:
    vectors = torch.randn(2, encoder.part.width, generator=torch.Generator().manual_seed(7))
    trunk = load_trunk(encoder.part, torch.float32, dict(encoder.projections))
    return TextTower(encoder, trunk, torch.device("cpu"), Table(cat=vectors[:1], dog=vectors[1:]))


@pytest.fixture
def plain(encoder: Encoder) -> EncodeUnit:
    (row,) = random_rows(encoder, 1)
    return EncodeUnit(
        encoder.fingerprint, (row.token_ids[0], FIRST_CONCEPT_ID, *row.token_ids[2:]), "pooled", "", ("cat",)
    )


def make(tower: TextTower, encoder: Encoder) -> tuple[EncoderPool, InProcessMetrics]:
    metrics = InProcessMetrics()
    return EncoderPool(tower, encoder, Settings(), metrics), metrics


def test_equal_ids_give_each_its_own_embedding_in_one_forward(
    tower: TextTower, encoder: Encoder, plain: EncodeUnit
) -> None:
    async def main() -> None:
        pool, metrics = make(tower, encoder)
        units = [plain, replace(plain, hidden=(2, 3)), replace(plain, concepts=("dog",)), replace(plain, hidden=(2,))]
        found = await pool.encode(units)
        assert (metrics.value(FORWARDS), metrics.value(ROWS)) == (1, 4)
        for unit, got in zip(units, found, strict=True):
            (alone,) = tower.encode([Row.of(unit, tower.outputs)])
            torch.testing.assert_close(unpack(got.value), alone["pooled"], atol=1e-5, rtol=0)
        assert len({got.value for got in found}) == 4
        await pool.close()

    asyncio.run(main())


def test_what_a_forward_gave_beside_is_kept_under_the_row_that_it_is_of(
    tower: TextTower, encoder: Encoder, plain: EncodeUnit
) -> None:
    async def main() -> None:
        pool, metrics = make(tower, encoder)
        hidden = replace(plain, hidden=(2, 3))
        other = next(output for output in encoder.outputs if output != "pooled")
        await pool.encode([hidden])
        (again,) = await pool.encode([replace(hidden, output=other)])
        assert again.tier is Tier.MEMORY
        (alone,) = tower.encode([Row.of(hidden, tower.outputs)])
        torch.testing.assert_close(unpack(again.value), alone[other], atol=1e-5, rtol=0)
        (whole,) = await pool.encode([replace(plain, output=other)])
        assert whole.tier is Tier.ENCODED
        assert metrics.value(FORWARDS) == 2
        await pool.close()

    asyncio.run(main())


def test_a_concept_that_is_gone_fails_its_own_request_alone(
    tower: TextTower, encoder: Encoder, plain: EncodeUnit
) -> None:
    async def main() -> None:
        pool, _ = make(tower, encoder)
        gone = replace(plain, concepts=("bird",))
        first, lost, last = await asyncio.gather(
            pool.encode([plain]),
            pool.encode([gone]),
            pool.encode([replace(plain, hidden=(4,))]),
            return_exceptions=True,
        )
        assert isinstance(lost, BackendUnavailable)
        assert not isinstance(first, BaseException)
        assert not isinstance(last, BaseException)
        await pool.close()

    asyncio.run(main())
