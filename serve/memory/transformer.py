"""The memory of a step of a diffusion transformer, by family: the moment of its blocks at which the most is alive.

Each figure follows from the source of diffusers' block; beside what a block makes, the transformer holds its input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from serve.memory.convolutions import FEED_FORWARD
from serve.memory.terms import BYTES, Dtype, ModelShape

REGISTERS = 8
"""Tokens that AuraFlow lays before its text."""
_FEED_FORWARD_MULTIPLE = 256
"""AuraFlow's."""


def step_numbers(shape: ModelShape, dtype: Dtype, width: int, height: int) -> int:
    """The most numbers alive in a forward pass, for one lane of so many latents."""
    config, text = shape.denoiser, shape.text_tokens
    context: int = text * config["caption_channels" if shape.family == "pixart" else "joint_attention_dim"]
    latents: int = shape.vae["latent_channels"] * width * height
    wide: int = config["num_attention_heads"] * config["attention_head_dim"]
    patch: int = 2 if shape.family == "flux" else config["patch_size"]
    tokens = (width // patch) * (height // patch)
    return latents + context + PEAKS[shape.family](config, wide, tokens, text, 4 // BYTES[dtype])


def rotary_bytes(shape: ModelShape, width: int, height: int) -> int:
    """FLUX's cosines and sines, float32, which all lanes share."""
    if shape.family != "flux":
        return 0
    angles: int = shape.denoiser["attention_head_dim"]
    return 2 * BYTES["float32"] * angles * (width * height // 4 + shape.text_tokens)


def _sd3(config: Any, wide: int, tokens: int, text: int, _: int) -> int:
    """At the image's feed-forward (its hidden layer before and after GELU), at the text's where that is longer, or
    where attention, which is over both, is projected. Dual attention leaves two tensors more; the last block, which is
    done with the text, still has the whole of what attention gave."""
    dual, hidden = config.get("dual_attention_layers") or (), 2 * FEED_FORWARD
    held = 4 + 2 * bool(dual)
    last = 5 + 2 * (config["num_layers"] - 1 in dual)
    of_image = (max(held, last) + hidden) * tokens + 3 * text
    of_text = (held + 1) * tokens + (4 + hidden) * text
    attention = (8 + bool(dual)) * tokens + 10 * text
    return wide * max(of_image, of_text, attention)


def _flux(_: Any, wide: int, tokens: int, text: int, doubles: int) -> int:
    """In a single block, over image and text: where the queries are rotated, in float32, of which three are alive
    (`doubles` as large as one in the model's dtype); or, in float32 itself, at the last projection."""
    rotated = 11 + 3 * doubles - (doubles == 1)
    return wide * (tokens + text) * max(rotated, 15)


def _pixart(_: Any, wide: int, tokens: int, text: int, __: int) -> int:
    return wide * ((4 + 2 * FEED_FORWARD) * tokens + text)


def _auraflow(_: Any, wide: int, tokens: int, text: int, __: int) -> int:
    """In a single block, over image and text: the gated feed-forward's two halves and their product."""
    hidden = -(-int(2 * FEED_FORWARD * wide / 3) // _FEED_FORWARD_MULTIPLE) * _FEED_FORWARD_MULTIPLE
    return (5 * wide + 3 * hidden) * (tokens + text + REGISTERS)


PEAKS: Mapping[str, Callable[[Any, int, int, int, int], int]] = {
    "sd3": _sd3,
    "flux": _flux,
    "pixart": _pixart,
    "auraflow": _auraflow,
}
"""Of the configuration, the width, tokens of image and text, and how many numbers of the dtype float32 takes."""
