"""The noise of one seed on its way to another's: pictures that vary one picture."""

from __future__ import annotations

import torch

PARALLEL = 0.9995
"""Cosine from which on two vectors are mixed along the straight line between them: the arc would divide by 0."""


def varied(noise: torch.Tensor, seed: int, share: float) -> torch.Tensor:
    """`noise`, (1, C, h, w) on the CPU, with `share` (0 to 1) of what `seed` draws in that shape.

    As A1111's variations, whose subseed this is ("Variation seed":
    https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features#variations): where its noise is drawn on the
    CPU, both start from the same. They go along the arc between the two (spherical interpolation, Shoemake 1985), which
    keeps the length that noise has; one arc for each column of latents of each channel, as there. 0 gives the noise
    itself, 1 the other.
    """
    other = torch.randn(noise.shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=noise.dtype)
    return _slerp(noise.float(), other.float(), share).to(noise.dtype)


def _slerp(low: torch.Tensor, high: torch.Tensor, share: float) -> torch.Tensor:
    """Over the columns (dimension 2)."""
    cosine = torch.nn.functional.cosine_similarity(low, high, dim=2).unsqueeze(2)
    angle = cosine.clamp(-PARALLEL, PARALLEL).acos()
    arc = ((1 - share) * angle).sin() / angle.sin() * low + (share * angle).sin() / angle.sin() * high
    return torch.where(cosine.abs() > PARALLEL, (1 - share) * low + share * high, arc)
