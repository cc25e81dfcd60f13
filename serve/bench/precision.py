"""What fewer bits cost and compiling gains: size, speed and the angle to float32, for weights and for cached values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Literal

import torch
from torch.nn import functional

from serve.bench.machine import Peaks
from serve.bench.shapes import EncoderShape
from serve.bench.stats import Spread
from serve.bench.texts import caption_rows
from serve.bench.weights import encoder_of
from serve.bench.windows import Budget, Series, Spare, TokenRow, in_turns
from serve.encoders.codec import pack, unpack
from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import Encoder
from serve.errors import TandemError
from serve.models import TextPart
from serve.settings.pools import EncoderSettings
from serve.settings.room import Dtype

Form = Literal["plain", "compiled", "int8", "int4"]

BATCH = 8
PRECISIONS: tuple[tuple[Dtype, Form], ...] = (
    ("float32", "plain"),
    ("float16", "plain"),
    ("bfloat16", "plain"),
    ("float32", "compiled"),
    ("bfloat16", "compiled"),
    ("float32", "int8"),
    ("bfloat16", "int8"),
    ("float32", "int4"),
    ("bfloat16", "int4"),
)
"""The first is what the others are compared with."""
_WORST = 4.0
"""How many times slower than the best matrix product an encoder may be."""
_FEWEST = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Closeness:
    """Cosine between a token's embedding and the same one in float32, over all tokens of all texts."""

    mean: float
    least: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """One encoder in one precision and form of its layers. `bytes` are its weights as loaded, `rows_per_s` is for
    forwards of `batch` rows, `others` the share of the processors that other processes had meanwhile.

    `refused` is why this device can't do it, and then nothing else is known.
    """

    encoder: str
    dtype: Dtype
    form: Form
    refused: str | None = None
    bytes: int | None = None
    batch: int | None = None
    rows_per_s: Spread | None = None
    others: float = 0.0
    cosine: Closeness | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredValues:
    """The cached values of one encoder: bytes of one text's embedding exactly and in the int8 codec."""

    encoder: str
    dtype: Dtype
    exact_bytes: int
    int8_bytes: int
    cosine: Closeness


def measure_precisions(
    shape: EncoderShape,
    part: TextPart,
    settings: EncoderSettings,
    device: str,
    budget: Budget,
    peaks: Peaks,
    *,
    compiled: bool = True,
) -> tuple[list[Precision], list[StoredValues]]:
    """A dtype in which the device is very slow gets fewer rows. `compiled`: those forms too, which take a while."""
    texts = caption_rows(shape, BATCH)
    spare = Spare()
    reference: list[torch.Tensor] | None = None
    measured, stored = [], []
    for dtype, form in PRECISIONS:
        if form == "compiled" and not compiled:
            continue
        bearable = int(budget.longest_s * peaks.best(dtype) / _WORST / shape.flop_per_row)
        rows = texts[: max(_FEWEST, min(BATCH, bearable))]
        quantization = form if form in ("int8", "int4") else "none"
        change = {"dtype": dtype, "quantization": quantization, "compile": form == "compiled"}
        chosen = settings.model_copy(update=change)
        one = Precision(encoder=shape.name, dtype=dtype, form=form)
        try:
            size, embeddings, series = _run(encoder_of(shape, part, chosen), device, rows, budget, spare)
        except (TandemError, RuntimeError) as error:
            measured.append(replace(one, refused=" ".join(str(error).split())[:200]))
            continue
        if reference is None:
            reference = embeddings
        measured.append(
            replace(
                one,
                bytes=size,
                batch=len(rows),
                rows_per_s=series.rows_per_s,
                others=series.others,
                cosine=closeness(embeddings, reference),
            )
        )
        if form == "plain":
            stored.append(_stored(shape.name, dtype, embeddings))
        del series  # it holds the weights, and the next ones come beside them
    return measured, stored


def _run(
    encoder: Encoder, device: str, rows: Sequence[TokenRow], budget: Budget, spare: Spare
) -> tuple[int, list[torch.Tensor], Series]:
    """Bytes of the weights, the rows' embeddings, and forwards of all of them."""
    tower = TextTower.load(encoder, device)
    embeddings = _contexts(tower, rows)
    series = Series(tower, repeat(rows), budget, spare)
    in_turns([series])
    return tower.nbytes, embeddings, series


def closeness(embeddings: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> Closeness:
    """Of (tokens, width) tensors, in pairs as far as both go. Computed in float64: the differences are that small."""
    pairs = list(zip(embeddings, reference, strict=False))
    cosines = torch.cat([functional.cosine_similarity(one.double(), other.double(), dim=-1) for one, other in pairs])
    return Closeness(mean=float(cosines.mean()), least=float(cosines.min()))


def _stored(name: str, dtype: Dtype, embeddings: Sequence[torch.Tensor]) -> StoredValues:
    packed = [pack(embedding, "int8") for embedding in embeddings]
    return StoredValues(
        encoder=name,
        dtype=dtype,
        exact_bytes=max(len(pack(embedding)) for embedding in embeddings),
        int8_bytes=max(map(len, packed)),
        cosine=closeness([unpack(value) for value in packed], embeddings),
    )


def _contexts(tower: TextTower, rows: Sequence[TokenRow]) -> list[torch.Tensor]:
    """Of each row, the first of the encoder's outputs: one vector for each token."""
    output = tower.outputs[0]
    return [outputs[output] for outputs in tower.encode([Row(row) for row in rows])]
