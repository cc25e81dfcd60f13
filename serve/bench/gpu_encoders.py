"""How many rows a second the text encoders compute on a card, with random weights that no file has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from serve.bench.gpu_memory import capped
from serve.bench.machine import Peaks
from serve.bench.random_models import random_module
from serve.bench.shapes import SHAPES, T5_XXL, EncoderShape
from serve.bench.throughput import Throughput, measure_throughput
from serve.bench.weights import encoder_of
from serve.bench.windows import Budget
from serve.encoders.forward import TextTower
from serve.encoders.weights import classes_of
from serve.memory.terms import Dtype
from serve.models import TextPart
from serve.settings.pools import EncoderSettings

MEASURED: Mapping[str, EncoderShape] = {each.name: each for each in (SHAPES["clip-l"], SHAPES["openclip-bigg"], T5_XXL)}
"""Those of SD 1.x, SDXL, SD 3.5 and FLUX."""


def measure_encoder(
    shape: EncoderShape, dtype: Dtype, device: torch.device, budget: Budget, look_s: float
) -> Throughput:
    """Rows a second by batch. Raises OutOfMemory."""
    with capped(device, None):
        tower = random_tower(shape, dtype, device)
        return measure_throughput(tower, shape, dtype, Peaks(device.type, look_s), budget, 0)


def random_tower(shape: EncoderShape, dtype: Dtype, device: torch.device) -> TextTower:
    """The encoder with random weights, which are made in the machine's memory."""
    part = TextPart(
        role="text_encoder",
        kind=shape.kind,
        name=shape.name,
        weights=Path(shape.name),
        tokenizer=Path(shape.name),
        width=shape.width,
        layers=shape.layers,
        vocab_size=shape.vocab_size,
        projection=shape.projection,
        row_tokens=None if shape.kind == "t5" else shape.row_tokens,
    )
    encoder = encoder_of(shape, part, EncoderSettings(dtype=dtype))
    kind = getattr(torch, dtype)
    built, trunk = classes_of(shape.kind)
    model = random_module(lambda: built(built.config_class(**shape.config)), kind)
    if shape.kind == "t5" and kind is torch.float16:
        _widen(model)
    model.to(device)
    heads = {
        name: torch.full((shape.projection or 0, shape.width), 0.01, dtype=kind, device=device)
        for name, _ in encoder.projections
    }
    return TextTower(encoder, trunk(model, kind, heads), device)


def _widen(model: nn.Module) -> None:
    """As transformers loads T5 in float16: the last layer of each feed-forward stays in float32."""
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.to(torch.float32)
