"""Which compromise makes a model fit a card. The same plan is what `tandem plan` prints, what a placement promises and
what a replica is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from serve.memory.classes import BUILT_IN, GpuClass
from serve.memory.footprint import footprint
from serve.memory.terms import Dtype, Footprint, ModelShape
from serve.models.denoiser import best_dtype
from serve.rungs import LADDER, MEANS, Rung

USABLE = 0.9
"""Share of a card's memory that weights and images may take: the rest is CUDA's context, cuDNN's workspaces and what
the allocator can't join."""
TILES = (1024, 768, 512)
"""Sides in pixels of the tiles in which an image is decoded, the best first."""
MOST_SIDE = 4096
"""Pixels; nothing larger is looked for."""
MOST_LANES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model is held on a card, or on a share of one.

    `width` and `height` are the planned size; `footprint` is that of one image of it, in as many lanes as most order
    it. `budget` are the usable bytes of the share. `tile` is the side above whose square an image of the planned size
    is decoded in tiles of that side; `tiles` has, the best side first, the most pixels of an image that is held with
    it. `max_pixels` is the largest image that this rung holds alone, `lanes` the most batch entries of a step at the
    planned size. `fits` is False where no rung that was allowed holds the size on the card: then `rung` is the last of
    them, and `max_pixels` and `lanes` are what it holds nevertheless, maybe 0.
    """

    rung: Rung
    dtype: Dtype
    tile: int
    tiles: tuple[tuple[int, int], ...]
    footprint: Footprint
    budget: int
    width: int
    height: int
    max_pixels: int
    lanes: int
    fits: bool

    def tile_of(self, pixels: int) -> int:
        """The side of the tiles for an image of so many pixels: the first of `tiles` that holds it, else the last."""
        return _tile_of(self.tiles, pixels)


def plan(
    shape: ModelShape,
    memory_bytes: float,
    dtypes: Sequence[Dtype],
    *,
    width: int | None = None,
    height: int | None = None,
    dtype: Dtype | None = None,
    best: Rung = Rung.RESIDENT,
    worst: Rung = Rung.CPU,
) -> Plan:
    """The first rung from `best` to `worst` that holds an image of that size, by default of the model's own, within
    USABLE of `memory_bytes`. `dtypes` are the card's, the best first; without `dtype` the family's own among them.
    """
    width, height = width or shape.default_width, height or shape.default_height
    dtype = dtype or _best(shape, dtypes)
    budget = int(USABLE * memory_bytes)
    rungs = LADDER[LADDER.index(best) : LADDER.index(worst) + 1] or (best,)
    for rung in rungs:
        held = footprint(shape, dtype, rung, width, height, shape.lanes, _sides(rung)[-1])
        if held.peak <= budget or rung is rungs[-1]:
            tiles = _reaches(shape, dtype, rung, budget)
            tile = _tile_of(tiles, width * height)
            held = footprint(shape, dtype, rung, width, height, shape.lanes, tile)
        if held.peak <= budget:
            break
    return Plan(
        rung=rung,
        dtype=dtype,
        tile=tile,
        tiles=tiles,
        footprint=held,
        budget=budget,
        width=width,
        height=height,
        max_pixels=max(most for _, most in tiles),
        lanes=_most_lanes(shape, dtype, rung, tile, budget, width, height),
        fits=held.peak <= budget and MEANS[rung].on_card,
    )


def smallest_class(
    shape: ModelShape,
    width: int,
    height: int,
    classes: Mapping[str, GpuClass] = BUILT_IN,
    worst: Rung = Rung.SEQUENTIAL_OFFLOAD,
    dtype: Dtype | None = None,
) -> GpuClass | None:
    """The class with the least memory that holds an image of that size on a rung no worse than `worst`; in `dtype`, or
    else in the best that the class has."""
    for each in sorted(classes.values(), key=lambda one: one.memory_gb):
        if plan(shape, each.memory_bytes, each.dtypes, width=width, height=height, dtype=dtype, worst=worst).fits:
            return each
    return None


def _best(shape: ModelShape, dtypes: Sequence[Dtype]) -> Dtype:
    name = best_dtype(shape.family, dtypes)
    return next(each for each in dtypes if each == name)


def _sides(rung: Rung) -> Sequence[int]:
    """Of the tiles on a rung, the best first. Where the model would decode an image whole, a rung that decodes whole
    up to there does too: only for larger images is there a choice."""
    return TILES if MEANS[rung].tile == TILES[0] else (MEANS[rung].tile,)


def _reaches(shape: ModelShape, dtype: Dtype, rung: Rung, budget: int) -> tuple[tuple[int, int], ...]:
    """`Plan.tiles`. Smaller tiles are of use only beyond what is decoded whole, and where that much is held."""
    best, *smaller = _sides(rung)
    reaches = [(best, _most_pixels(shape, dtype, rung, best, budget))]
    for tile in smaller:
        most = _most_pixels(shape, dtype, rung, tile, budget)
        if best * best <= reaches[-1][1] < most:
            reaches.append((tile, most))
    return tuple(reaches)


def _tile_of(tiles: Sequence[tuple[int, int]], pixels: int) -> int:
    return next((tile for tile, most in tiles if pixels <= most), tiles[-1][0])


def _most_pixels(shape: ModelShape, dtype: Dtype, rung: Rung, tile: int, budget: int) -> int:
    """Of an image that is nearly a square; 0 where none fits."""
    grid = shape.size_multiple

    def holds(columns: int, rows: int) -> bool:
        held = footprint(shape, dtype, rung, columns * grid, rows * grid, shape.lanes, tile)
        return held.peak <= budget

    side = _most(lambda steps: holds(steps, steps), MOST_SIDE // grid)
    if not side:
        return 0
    columns = max(each for each in (side, side + 1, side + 2) if each == side or holds(each, side))
    return columns * side * grid * grid


def _most_lanes(shape: ModelShape, dtype: Dtype, rung: Rung, tile: int, budget: int, width: int, height: int) -> int:
    return _most(lambda n: footprint(shape, dtype, rung, width, height, n, tile).peak <= budget, MOST_LANES)


def _most(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that holds, 0 where not even 1 does; more never holds where less does not."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
