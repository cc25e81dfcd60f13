"""The memory of a step of a U-Net: its levels walked down and up, with the skips that wait meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from serve.memory.convolutions import resnet, stack, upsampled
from serve.memory.terms import ModelShape


@dataclass(frozen=True, slots=True)
class _Level:
    """`pixels` of one lane's picture at this resolution."""

    channels: int
    pixels: int
    blocks: int
    attends: bool


def step_numbers(shape: ModelShape, width: int, height: int, copies: bool) -> int:
    """The most numbers alive in a forward pass, for one lane of so many latents."""
    config = shape.denoiser
    levels = _levels(config, width, height)
    inputs: int = shape.text_tokens * config["cross_attention_dim"] + config["in_channels"] * width * height
    return inputs + max(_peaks(levels, _ups(config), copies))


def _levels(config: Any, width: int, height: int) -> list[_Level]:
    channels = config["block_out_channels"]
    blocks = _each(config.get("layers_per_block", 2), len(channels))
    levels = []
    for wide, count, kind in zip(channels, blocks, config["down_block_types"], strict=True):
        levels.append(_Level(wide, width * height, count, "CrossAttn" in kind))
        width, height = -(-width // 2), -(-height // 2)
    return levels


def _ups(config: Any) -> list[bool]:
    """Whether each level attends on the way up, from the lowest one."""
    return ["CrossAttn" in kind for kind in config["up_block_types"]]


def _peaks(levels: Sequence[_Level], ups: Sequence[bool], copies: bool) -> Iterator[int]:
    skips = [levels[0].channels * levels[0].pixels]
    yield from _down(levels, skips, copies)
    last = levels[-1]
    sample = last.channels * last.pixels
    yield sum(skips) + sample + (max(stack(last.channels), resnet(last.channels, last.channels, copies))) * last.pixels
    for index, (level, attends) in enumerate(zip(reversed(levels), ups, strict=True)):
        entering = levels[-max(index, 1)].channels
        yield from _up(level, entering, attends, skips, index + 1 < len(levels), copies)
        del skips[-level.blocks - 1 :]


def _down(levels: Sequence[_Level], skips: list[int], copies: bool) -> Iterator[int]:
    """Every block's result is a skip, and the next block's input."""
    entering = levels[0].channels
    for index, level in enumerate(levels):
        wide, pixels = level.channels, level.pixels
        for _ in range(level.blocks):
            yield sum(skips) + resnet(entering, wide, copies) * pixels
            if level.attends:
                yield sum(skips) + (wide + stack(wide)) * pixels
            skips.append(wide * pixels)
            entering = wide
        if index + 1 < len(levels):
            skips.append(wide * levels[index + 1].pixels)


def _up(
    level: _Level, entering: int, attends: bool, skips: Sequence[int], enlarges: bool, copies: bool
) -> Iterator[int]:
    """The level's input is held by the U-Net, and all of its skips, until it is done."""
    wide, pixels = level.channels, level.pixels
    held = sum(skips) + entering * pixels
    before = entering
    for skip in reversed(skips[-level.blocks - 1 :]):
        both = before + skip // pixels
        # While the two are laid side by side, the one before is there twice, but for the first, which is the input.
        yield held + (both + (0 if before is entering else before)) * pixels
        yield held + (both + resnet(both, wide, copies)) * pixels
        if attends:
            yield held + (wide + stack(wide)) * pixels
        before = wide
    if enlarges:
        yield held + (wide + upsampled(wide, copies and attends)) * pixels


def _each(value: int | Iterable[int], count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)
