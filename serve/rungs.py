"""The memory ladder: what a replica gives up, rung by rung, so that its card holds the model."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


class Rung(enum.StrEnum):
    """Best to worst. A rung has what its `Means` say; only the pictures of `int8` and `int4` differ by more than
    rounding from those of `resident`, and those of `vae_tiling` where an image is larger than a tile.
    """

    RESIDENT = "resident"
    """All weights on the card, in the model's dtype. One image is decoded beside the steps of the others."""
    VAE_SLICING = "vae_slicing"
    """An image is decoded between two steps, when their activations are gone."""
    VAE_TILING = "vae_tiling"
    """It is decoded in overlapping tiles of 512 pixels a side."""
    ATTENTION_SLICING = "attention_slicing"
    """Attention is computed in slices. Saves memory only where the fused kernels are missing."""
    INT8 = "int8"
    """The denoiser's linear layers have 8-bit weights."""
    INT4 = "int4"
    """They have 4-bit weights (NF4)."""
    OFFLOAD = "offload"
    """The denoiser's blocks lie in the machine's memory and come to the card in groups, ahead of their turn."""
    SEQUENTIAL_OFFLOAD = "sequential_offload"
    """Each layer comes to the card for its own computation, as it is needed."""
    CPU = "cpu"
    """The card computes nothing."""


LADDER: tuple[Rung, ...] = tuple(Rung)


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What a rung does. `tile` is the side in pixels above whose square an image is decoded in tiles."""

    decode: Literal["beside", "between"] = "between"
    tile: int = 512
    sliced_attention: bool = False
    weights: Literal["plain", "int8", "int4"] = "plain"
    offload: Literal["none", "group", "sequential"] = "none"
    on_card: bool = True


MEANS: dict[Rung, Means] = {
    Rung.RESIDENT: Means(decode="beside", tile=1024),
    Rung.VAE_SLICING: Means(tile=1024),
    Rung.VAE_TILING: Means(),
    Rung.ATTENTION_SLICING: Means(sliced_attention=True),
    Rung.INT8: Means(weights="int8"),
    Rung.INT4: Means(weights="int4"),
    Rung.OFFLOAD: Means(offload="group"),
    Rung.SEQUENTIAL_OFFLOAD: Means(offload="sequential", sliced_attention=True),
    Rung.CPU: Means(decode="beside", tile=1024, on_card=False),
}


def worse(rung: Rung, than: Rung) -> bool:
    return LADDER.index(rung) > LADDER.index(than)


def same_times(one: Rung, other: Rung) -> bool:
    """Whether a step takes the same on both, but for what attention in slices costs."""
    left, right = MEANS[one], MEANS[other]
    return (left.weights, left.offload, left.on_card) == (right.weights, right.offload, right.on_card)


def worst_of(rungs: Iterable[Rung]) -> Rung:
    """Raises ValueError for none."""
    return max(rungs, key=LADDER.index)
