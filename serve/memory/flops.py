"""How many operations a forward takes: a multiplication and an addition are two. Plain arithmetic from configurations.

Convolutions, linear layers and attention are counted; norms, activations and sums are left out, about a hundredth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.memory.terms import ModelShape

AURAFLOW_REGISTERS = 8
"""Tokens that AuraFlow puts before those of its text."""


@dataclass(frozen=True, slots=True)
class Work:
    """`flops`, and the number of products (convolutions, matrix products, attentions) that they are made in: each is a
    kernel that is launched, with the small ones around it."""

    flops: float = 0.0
    products: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.products + other.products)

    def __mul__(self, times: int) -> Work:
        return Work(self.flops * times, self.products * times)


def forward(shape: ModelShape, width: int, height: int) -> Work:
    """One pass of the denoiser over one lane of that size in pixels. Raises KeyError for a family that is unknown."""
    columns, rows = width // shape.vae_scale_factor, height // shape.vae_scale_factor
    return _FORWARDS[shape.family](shape, rows, columns)


def decoding(shape: ModelShape, width: int, height: int, tile: int) -> Work:
    """One image of that size in pixels, whole up to tile x tile of them and else in tiles of that side, which overlap
    by a quarter."""
    factor = shape.vae_scale_factor
    if width * height <= tile * tile:
        return _decoder(shape.vae, height // factor, width // factor)
    return sum(
        (
            _decoder(shape.vae, rows, columns)
            for rows in _tiles(height // factor, tile // factor)
            for columns in _tiles(width // factor, tile // factor)
        ),
        Work(),
    )


def _tiles(side: int, tile: int) -> Iterator[int]:
    """Sides of the tiles along one side, in latents, as diffusers cuts them."""
    for start in range(0, side, int(tile * 0.75)):
        yield min(tile, side - start)


def _product(numbers: float, tokens: float) -> Work:
    """`tokens` vectors, each times a matrix (or a convolution's) of so many numbers."""
    return Work(2.0 * numbers * tokens, 1)


def _attention(queries: int, keys: int, width: int) -> Work:
    """Both of its products; fused they are one kernel."""
    return Work(4.0 * queries * keys * width, 1)


# U-Nets


def _unet(shape: ModelShape, rows: int, columns: int) -> Work:
    config = shape.denoiser
    widths: Sequence[int] = config["block_out_channels"]
    levels = len(widths)
    tokens = [_halved(rows, level) * _halved(columns, level) for level in range(levels)]
    residuals = _by_level(config.get("layers_per_block", 2), levels)
    depths = _by_level(config.get("transformer_layers_per_block", 1), levels)
    attends = [kind.startswith("CrossAttn") for kind in config["down_block_types"]]
    stack = _Stack(int(config["cross_attention_dim"]), shape.text_tokens, int(widths[0]) * 4)

    total = _product(9 * config["in_channels"] * widths[0], tokens[0])
    for level, width in enumerate(widths):
        before = widths[max(level - 1, 0)]
        for index in range(residuals[level]):
            total += stack.residual(width if index else before, width, tokens[level])
            if attends[level]:
                total += stack.transformer(width, tokens[level], depths[level])
        if level + 1 < levels:
            total += _product(9 * width * width, tokens[level + 1])
    last = widths[-1]
    total += stack.residual(last, last, tokens[-1]) * 2 + stack.transformer(last, tokens[-1], depths[-1])
    for level in reversed(range(levels)):
        width, above = widths[level], widths[min(level + 1, levels - 1)]
        below = widths[max(level - 1, 0)]
        for index in range(residuals[level] + 1):
            skip = below if index == residuals[level] else width
            total += stack.residual((width if index else above) + skip, width, tokens[level])
            if attends[level]:
                total += stack.transformer(width, tokens[level], depths[level])
        if level:
            total += _product(9 * width * width, tokens[level - 1])
    return total + _product(9 * widths[0] * config["out_channels"], tokens[0])


@dataclass(frozen=True, slots=True)
class _Stack:
    """What the levels of a U-Net are made of. `context` is the width of the text, `time` that of the time embedding."""

    context: int
    text: int
    time: int

    def residual(self, inside: int, outside: int, tokens: int) -> Work:
        work = _product(9 * inside * outside, tokens) + _product(9 * outside * outside, tokens)
        work += _product(self.time * outside, 1)
        return work + _product(inside * outside, tokens) if inside != outside else work

    def transformer(self, width: int, tokens: int, depth: int) -> Work:
        own = _product(width * width, tokens) * 4 + _attention(tokens, tokens, width)
        text = _product(width * width, tokens) * 2 + _product(self.context * width, self.text) * 2
        text += _attention(tokens, self.text, width)
        hidden = _product(width * 8 * width, tokens) + _product(4 * width * width, tokens)
        return (own + text + hidden) * depth + _product(width * width, tokens) * 2


def _by_level(value: int | Sequence[int], levels: int) -> Sequence[int]:
    return [value] * levels if isinstance(value, int) else value


def _halved(side: int, times: int) -> int:
    for _ in range(times):
        side = math.ceil(side / 2)
    return side


# Transformers


def _inner(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def _joint(width: int, image: int, text: int, hidden: int, *, last: bool = False) -> Work:
    """A block in which image and text attend to each other, each with weights of its own. `hidden` are the numbers of
    its feed-forward; the last block of SD 3 drops its text."""
    work = _product(width * width, image) * 4 + _product(width * width, text) * (3 if last else 4)
    work += _attention(image + text, image + text, width) + _product(hidden / 2, image) * 2
    work += _product(6 * width * width, 1) + _product((2 if last else 6) * width * width, 1)
    return work if last else work + _product(hidden / 2, text) * 2


def _sd3(shape: ModelShape, rows: int, columns: int) -> Work:
    config, text = shape.denoiser, shape.text_tokens
    width, patch = _inner(config), int(config["patch_size"])
    image = (rows // patch) * (columns // patch)
    joint = _joint(width, image, text, 8 * width * width)
    total = joint * (int(config["num_layers"]) - 1) + _joint(width, image, text, 8 * width * width, last=True)
    own = _product(width * width, image) * 4 + _attention(image, image, width) + _product(3 * width * width, 1)
    total += own * len(config.get("dual_attention_layers") or ())
    channels = config["in_channels"] * patch * patch
    return total + _product(channels * width, image) * 2 + _product(config["joint_attention_dim"] * width, text)


def _flux(shape: ModelShape, rows: int, columns: int) -> Work:
    config, text = shape.denoiser, shape.text_tokens
    width, image = _inner(config), rows * columns // 4
    both = image + text
    total = _joint(width, image, text, 8 * width * width) * int(config["num_layers"])
    single = _product(width * width, both) * 3 + _product(4 * width * width, both) + _attention(both, both, width)
    single += _product(5 * width * width, both) + _product(3 * width * width, 1)
    total += single * int(config["num_single_layers"])
    return (
        total
        + _product(config["in_channels"] * width, image) * 2
        + _product(config["joint_attention_dim"] * width, text)
    )


def _auraflow(shape: ModelShape, rows: int, columns: int) -> Work:
    config = shape.denoiser
    width, patch = _inner(config), int(config["patch_size"])
    image, text = (rows // patch) * (columns // patch), shape.text_tokens + AURAFLOW_REGISTERS
    # Three matrices to a width of two thirds of four times, rounded up to a multiple of 256.
    hidden = 3 * width * math.ceil(int(2 * 4 * width / 3) / 256) * 256
    joint = _product(width * width, image) * 4 + _product(width * width, text) * 4
    joint += _attention(image + text, image + text, width) + _product(hidden / 3, image) * 3
    joint += _product(hidden / 3, text) * 3 + _product(6 * width * width, 1) * 2
    both = image + text
    single = _product(width * width, both) * 4 + _attention(both, both, width) + _product(hidden / 3, both) * 3
    single += _product(6 * width * width, 1)
    total = joint * int(config["num_mmdit_layers"]) + single * int(config["num_single_dit_layers"])
    channels = config["in_channels"] * patch * patch
    return (
        total
        + _product(channels * width, image) * 2
        + _product(config["joint_attention_dim"] * width, shape.text_tokens)
    )


def _pixart(shape: ModelShape, rows: int, columns: int) -> Work:
    config, text = shape.denoiser, shape.text_tokens
    width, patch = _inner(config), int(config["patch_size"])
    image = (rows // patch) * (columns // patch)
    block = _product(width * width, image) * 4 + _attention(image, image, width)
    block += _product(width * width, image) * 2 + _product(width * width, text) * 2 + _attention(image, text, width)
    block += _product(4 * width * width, image) * 2
    caption = _product(config["caption_channels"] * width, text) + _product(width * width, text)
    ends = _product(config["in_channels"] * patch * patch * width, image)
    return (
        block * int(config["num_layers"])
        + caption
        + ends
        + _product(config["out_channels"] * patch * patch * width, image)
    )


_FORWARDS: Mapping[str, Callable[[ModelShape, int, int], Work]] = {
    "sd": _unet,
    "sdxl": _unet,
    "sdxl_refiner": _unet,
    "sd3": _sd3,
    "flux": _flux,
    "pixart": _pixart,
    "auraflow": _auraflow,
}


# VAE


def _decoder(config: Mapping[str, Any], rows: int, columns: int) -> Work:
    """AutoencoderKL's decoder over latents of that size."""
    widths: Sequence[int] = config["block_out_channels"]
    last, latents, tokens = widths[-1], config["latent_channels"], rows * columns

    def residual(inside: int, outside: int) -> Work:
        work = _product(9 * inside * outside, tokens) + _product(9 * outside * outside, tokens)
        return work + _product(inside * outside, tokens) if inside != outside else work

    total = _product(9 * latents * last, tokens) + residual(last, last) * 2
    if config.get("mid_block_add_attention", True):
        total += _product(last * last, tokens) * 4 + _attention(tokens, tokens, last)
    before = last
    for level in reversed(range(len(widths))):
        width = widths[level]
        for index in range(config.get("layers_per_block", 1) + 1):
            total += residual(width if index else before, width)
        before = width
        if level:
            tokens *= 4
            total += _product(9 * width * width, tokens)
    return total + _product(9 * widths[0] * config["out_channels"], tokens)
