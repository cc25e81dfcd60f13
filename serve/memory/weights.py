"""What of a model's weights lies on the card, by rung. Plain arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

from serve.memory.terms import BYTES, Dtype, ModelShape
from serve.rungs import MEANS, Rung

BITS: Mapping[str, float] = {"int8": 8.25, "int4": 4.5}
"""Of one quantized weight, with its share of its block's scale (serve/quantize.py)."""
UPCASTS_VAE = frozenset({"sdxl", "sdxl_refiner", "auraflow"})
"""Families whose VAE is computed in float32 where its `force_upcast` says so."""


def upcasts_vae(shape: ModelShape) -> bool:
    """Whether the VAE overflows float16, so that it is kept in float32 there. Diffusers' default says it does."""
    return shape.family in UPCASTS_VAE and bool(shape.vae.get("force_upcast", True))


def vae_dtype(shape: ModelShape, dtype: Dtype) -> Dtype:
    """In which the VAE lies on the card and decodes."""
    return "float32" if dtype == "float16" and upcasts_vae(shape) else dtype


def weight_bytes(shape: ModelShape, dtype: Dtype, rung: Rung, *, vae_upcast: bool | None = None) -> int:
    """Bytes of the denoiser's and the VAE's weights; under offloading, the most of them that is there at a time: two
    blocks of the denoiser (one computes while the next one comes) with what is outside of blocks, or one layer with
    what is no layer's.

    `vae_upcast` says that the VAE lies there in float32 whatever the dtype; None takes what the model needs.
    """
    means = MEANS[rung]
    if not means.on_card:
        return 0
    size = BYTES[dtype]
    upcast = vae_dtype(shape, dtype) == "float32" if vae_upcast is None else vae_upcast
    vae = shape.vae_parameters * (4 if upcast else size)
    if means.offload == "group":
        return (shape.outside + 2 * shape.largest_block) * size + vae
    if means.offload == "sequential":
        return (shape.largest_layer + shape.loose) * size + vae
    packed = 0 if means.weights == "plain" else shape.linear
    bits = BITS.get(means.weights, 0.0)
    return (shape.parameters - packed) * size + round(packed * bits / 8) + vae
