"""Sizes by aspect ratio: what each family draws well, on its grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product

from serve.models.denoiser import Denoiser

AUTO = "Auto"
"""Stands for the ratio of the image to start from (`auto`)."""
_SHORT_512: Mapping[str, tuple[int, int]] = {
    "1:1": (512, 512),
    "16:9": (912, 512),
    "9:16": (512, 912),
    "4:3": (680, 512),
    "3:4": (512, 680),
    "3:2": (768, 512),
    "2:3": (512, 768),
    "5:4": (640, 512),
    "4:5": (512, 640),
    "21:9": (1152, 512),
}
"""Stable Diffusion 1.x and 2.x, trained on squares alone, keep the short side: where it shrinks, things lose parts."""
_AREA_1024: Mapping[str, tuple[int, int]] = {
    "1:1": (1024, 1024),
    "16:9": (1344, 768),
    "9:16": (768, 1344),
    "4:3": (1152, 896),
    "3:4": (896, 1152),
    "3:2": (1216, 832),
    "2:3": (832, 1216),
    "5:4": (1088, 896),
    "4:5": (896, 1088),
    "21:9": (1536, 640),
}
"""The nearest of `_TRAINED`. The later families were trained on the same area in many ratios."""
_SIDES = {512: (2048, 1984, 1920, 1856), 576: (1792, 1728, 1664), 640: (1600, 1536), 704: (1472, 1408, 1344)}
_SIDES |= {768: (1344, 1280), 832: (1216, 1152), 896: (1152, 1088), 960: (1088, 1024), 1024: (1024,)}
_TRAINED = tuple((long, short) for short, longs in _SIDES.items() for long in longs)
"""Sizes that SDXL was trained on, lying and standing (Podell et al. 2023, https://arxiv.org/abs/2307.01952,
appendix I)."""
_WIDEST = 4.0
"""The most extreme ratio among them."""
RATIOS = tuple(_AREA_1024)
"""Names of `presets`, without `AUTO`."""


def presets(denoiser: Denoiser, family: str, *, max_side: int | None = None) -> Mapping[str, tuple[int, int]]:
    """Ratio -> (width, height), multiples of `size_multiple`, for the size that the model is made for.

    No side is longer than `max_side` or than the model's `largest_side`: a size that would be is drawn smaller.
    """
    table, base = (_SHORT_512, 512) if family == "sd" else (_AREA_1024, 1024)
    scale, longest = _side(denoiser) / base, _longest(denoiser, max_side)
    sizes = {}
    for name, size in table.items():
        across, down = name.split(":")
        sizes[name] = _scaled(size, scale, int(across) / int(down), denoiser.size_multiple, longest)
    return sizes


def auto(denoiser: Denoiser, family: str, width: int, height: int, *, max_side: int | None = None) -> tuple[int, int]:
    """The width and height for an image of that size in pixels: near its ratio, on the grid, of the area of the
    model's own size. Ratios beyond 4:1 are drawn as 4:1."""
    ratio = min(max(width / height, 1 / _WIDEST), _WIDEST)
    side, grid, longest = _side(denoiser), denoiser.size_multiple, _longest(denoiser, max_side)
    if family == "sd":
        return _fitted(ratio, side**2, grid, longest)
    wide = max(ratio, 1 / ratio)
    long, short = min(_TRAINED, key=lambda size: abs(math.log(size[0] / size[1] / wide)))
    return _scaled((long, short) if ratio >= 1 else (short, long), side / 1024, ratio, grid, longest)


def _side(denoiser: Denoiser) -> float:
    return math.sqrt(denoiser.default_width * denoiser.default_height)


def _longest(denoiser: Denoiser, max_side: int | None) -> float:
    return min(max_side or math.inf, denoiser.largest_side or math.inf)


def _scaled(size: tuple[int, int], scale: float, ratio: float, grid: int, longest: float) -> tuple[int, int]:
    """`size` at that scale where it is on the grid then, else what comes near its area in that ratio."""
    width, height = size[0] * scale, size[1] * scale
    if max(width, height) <= longest and width % grid == height % grid == 0:
        return int(width), int(height)
    return _fitted(ratio, width * height, grid, longest)


def _fitted(ratio: float, area: float, grid: int, longest: float) -> tuple[int, int]:
    """The size on the grid that is nearest in ratio and area, both as logarithms; where the ratio would be off by more
    than 3 %, that counts more. Both sides are at least one step of the grid."""
    wide = max(ratio, 1 / ratio)
    area = min(area, longest * longest / wide)

    def around(side: float) -> list[int]:
        steps = int(side // grid)
        sides = [max(step, 1) * grid for step in range(steps - 2, steps + 3)]
        return [side for side in sides if side <= longest] or [grid]

    def distance(size: tuple[int, int]) -> float:
        skew = abs(math.log(size[0] / size[1] / ratio))
        return skew + 10.0 * max(skew - 0.03, 0.0) + abs(math.log(size[0] * size[1] / area))

    return min(product(around(math.sqrt(area * ratio)), around(math.sqrt(area / ratio))), key=distance)
