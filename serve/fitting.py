"""How a picture comes to another size."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from serve.domain.orders import ResizeMode

WHITE_FROM = 128
"""Least value of a mask's pixel that counts as white: diffusers binarises at 0.5."""


def resized(image: Image.Image, width: int, height: int, mode: ResizeMode) -> Image.Image:
    """The picture at width x height, by Lanczos; itself where it has that size."""
    if image.size == (width, height):
        return image
    if mode is ResizeMode.CROP:
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    if mode is ResizeMode.FILL:
        return _filled(image, width, height)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def inner_box(size: tuple[int, int], within: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a picture of that size which lies in the middle of another one, in its own ratio
    and as large as it can be there."""
    (width, height), (wide, high) = size, within
    scale = min(wide / width, high / height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (wide - inner[0]) // 2, (high - inner[1]) // 2
    return left, top, left + inner[0], top + inner[1]


def _filled(image: Image.Image, width: int, height: int) -> Image.Image:
    """All of the picture in its own ratio in the middle; its outermost rows or columns are repeated to the edges."""
    left, top, right, bottom = inner_box(image.size, (width, height))
    pixels = np.asarray(image.resize((right - left, bottom - top), Image.Resampling.LANCZOS))
    around = [(top, height - bottom), (left, width - right), (0, 0)]
    return Image.fromarray(np.pad(pixels, around[: pixels.ndim], mode="edge"))
