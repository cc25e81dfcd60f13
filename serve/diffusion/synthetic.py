"""Made-up input for the denoiser, of the sizes that real requests have: what steps are timed with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from serve.diffusion.families.base import Family, Lane
from serve.domain.conditioning import TextEmbedding
from serve.models.denoiser_configs import TIME_IDS

TOKENS: Mapping[str, int] = {"sd3": 333, "flux": 512, "pixart": 300, "auraflow": 256}
"""Text tokens of a usual row: CLIP's 77, SD 3's with T5's 256 beside them, T5's of the others."""


def synthetic_lanes(family: Family, shape: tuple[int, int], count: int) -> list[Lane]:
    """Lanes of latents of this (height, width), half-way down the model's schedule."""
    denoiser = family.model.denoiser
    assert denoiser is not None, "a model for text only is never drawn with"
    generator = torch.Generator().manual_seed(0)
    text = family.text(*synthetic_text(family, generator))
    latents = family.place(torch.randn(1, denoiser.latent_channels, *shape, generator=generator))
    extra = denoiser.in_channels - denoiser.latent_channels
    masked = extra and family.model.family in ("sd", "sdxl")
    beside = family.place(torch.randn(1, extra, *shape, generator=generator)) if masked else None
    return [Lane(latents, torch.tensor(500.0), text, 4.0, beside) for _ in range(count)]


def synthetic_text(family: Family, generator: torch.Generator) -> tuple[TextEmbedding, torch.Tensor | None]:
    """A row of usual length, and the time ids of a family that reads them."""
    name = family.model.family
    ids = TIME_IDS.get(name)
    pooled = _pooled_width(family.denoiser.config, ids or 0)
    context = torch.randn(TOKENS.get(name, 77), family.model.context_width, generator=generator)
    vector = None if pooled is None else torch.randn(pooled, generator=generator)
    return TextEmbedding(context, vector), None if ids is None else torch.full((ids,), 512.0)


def _pooled_width(config: Any, time_ids: int) -> int | None:
    if time_ids:
        return int(config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim)
    width = config.get("pooled_projection_dim")
    return None if width is None else int(width)
