"""What a phase takes on top of the weights: activations of diffusers' models with fused attention, as a GPU has them.

Arithmetic from the configurations, held against counts of every tensor (docs/performance.md). What is not in it:
workspaces of cuDNN and cuBLAS, and what the allocator can't join; they are what is left free of a card.
"""

from __future__ import annotations

from serve.memory import transformer, unet
from serve.memory.terms import BYTES, Dtype, ModelShape
from serve.memory.vae import CHANNELS, decode_numbers, encode_numbers, tiles
from serve.memory.weights import upcasts_vae, vae_dtype


def step_bytes(shape: ModelShape, dtype: Dtype, width: int, height: int, lanes: int, *, copies: bool = True) -> int:
    """Of a forward pass of the denoiser over so many lanes of one size in pixels.

    `copies`, here and below: as a GPU computes convolutions (serve/memory/convolutions.py); a CPU does not. Attention
    that is sliced takes as much: a fused kernel keeps no scores that slices could save.
    """
    wide, high = width // shape.vae_scale_factor, height // shape.vae_scale_factor
    if "block_out_channels" in shape.denoiser:
        return lanes * BYTES[dtype] * unet.step_numbers(shape, wide, high, copies)
    numbers = transformer.step_numbers(shape, dtype, wide, high)
    return lanes * BYTES[dtype] * numbers + transformer.rotary_bytes(shape, wide, high)


def decode_bytes(shape: ModelShape, dtype: Dtype, width: int, height: int, tile: int, *, copies: bool = True) -> int:
    """Of one image, decoded whole up to tile x tile pixels and else in tiles of that side, whose pictures wait for one
    another."""
    wide, high, waiting = _computed(width, height, tile)
    numbers = decode_numbers(shape.vae["block_out_channels"], wide * high, copies) + CHANNELS * waiting
    return numbers * BYTES[vae_dtype(shape, dtype)]


def encode_bytes(shape: ModelShape, dtype: Dtype, width: int, height: int, tile: int, *, copies: bool = True) -> int:
    """Of one image, whole or in tiles as `decode_bytes`. A bfloat16 VAE that encodes in float32 has its weights
    converted for it, and both copies are there while they are."""
    upcast = upcasts_vae(shape)
    wide, high, _ = _computed(width, height, tile)
    channels, blocks = shape.vae["block_out_channels"], shape.vae.get("layers_per_block", 1)
    rest = CHANNELS * (width * height - wide * high)
    numbers = encode_numbers(channels, blocks, wide * high, copies) + rest
    converted = shape.vae_parameters * 4 if upcast and dtype == "bfloat16" else 0
    return max(converted, numbers * (4 if upcast else BYTES[dtype]) + converted // 2)


def _computed(width: int, height: int, tile: int) -> tuple[int, int, int]:
    """Width and height in pixels of the largest tile, and the pixels of those that are done before the last one of its
    size: row by row, as diffusers has them."""
    if width * height <= tile * tile:
        return width, height, 0
    across, down = tiles(width, tile), tiles(height, tile)
    column, row = across.count(across[0]) - 1, down.count(down[0]) - 1
    return across[0], down[0], sum(down[:row]) * sum(across) + down[row] * sum(across[:column])
