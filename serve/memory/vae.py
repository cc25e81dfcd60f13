"""The memory of a VAE that decodes or encodes one image, whole or tile by tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from serve.memory.convolutions import resnet, upsampled

CHANNELS = 3
"""Of a picture."""
OVERLAP = 0.25
"""Share of a tile's side that the next one repeats: diffusers' `tile_overlap_factor`."""


def decode_numbers(channels: Sequence[int], pixels: int, copies: bool) -> int:
    """The most numbers alive while an image of so many pixels is decoded whole. `channels` are the VAE's, from full
    size down; `copies` as in serve/memory/convolutions.py."""
    return int(max(_decoding(channels, pixels, copies)))


def encode_numbers(channels: Sequence[int], blocks: int, pixels: int, copies: bool) -> int:
    """As `decode_numbers`, beside the picture; `blocks` are those of a level."""
    return CHANNELS * pixels + int(max(_encoding(channels, blocks, pixels, copies)))


def tiles(side: int, tile: int) -> list[int]:
    """The lengths of the tiles along a side; the last ones are cut off."""
    return [min(tile, side - start) for start in range(0, side, int(tile * (1 - OVERLAP)))]


def _decoding(channels: Sequence[int], pixels: int, copies: bool) -> Iterator[float]:
    entering = channels[-1]
    for level, wide in reversed(list(enumerate(channels))):
        here = pixels / 4**level
        yield (entering + resnet(entering, wide, copies)) * here
        yield (entering + wide + resnet(wide, wide, copies)) * here
        if level:
            yield (entering + wide + upsampled(wide, copies=False)) * here
        entering = wide


def _encoding(channels: Sequence[int], blocks: int, pixels: int, copies: bool) -> Iterator[float]:
    entering = channels[0]
    for level, wide in enumerate(channels):
        here = pixels / 4**level
        yield (entering + resnet(entering, wide, copies)) * here
        if blocks > 1:
            yield (entering + wide + resnet(wide, wide, copies)) * here
        entering = wide
