"""Says what a picture shows, from its pixels alone: nothing here is learned, nothing knows the prompt.

The background is the border's median colour; objects are the connected regions that differ from it; a colour's name is
the nearest of the ten in CIELAB; a shape is the one whose drawn outline overlaps the region best (intersection over
union, IoU). Only numpy and Pillow; a picture takes some milliseconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.shapes import expectation
from serve.shapes.draw import COLOR_NAMES, PALETTE, PLACES, RGB, SHAPES, Scene, signed_distance
from serve.shapes.expectation import Expectation, ExpectedThing

FloatArray = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

DIFFERENT = 18.0
"""CIELAB distance from the background at which a pixel belongs to an object."""
MIN_AREA = 0.004
"""Smaller regions (share of the picture) are specks, not objects."""
MIN_IOU = 0.7
"""A region whose best shape overlaps less has no shape."""
PLACE_TOLERANCE = 0.13
ORDER_MARGIN = 0.1
SPLIT_SHARE = 0.25
"""Two palette colours that each cover more of a region than this make it two touching objects."""


@dataclass(frozen=True)
class SeenThing:
    """One object: names, IoU with the drawn shape, centre and area (fractions of the picture), median sRGB in 0..1."""

    color: str
    shape: str
    iou: float
    x: float
    y: float
    area: float
    rgb: RGB


@dataclass(frozen=True)
class Reading:
    """What a picture shows; the largest thing comes first."""

    background: str
    background_rgb: RGB
    things: tuple[SeenThing, ...]


@dataclass(frozen=True)
class Verdict:
    """Which demands a reading meets. For two things: colours = both colours there, places = the right order."""

    background: bool
    count: bool
    colors: bool
    shapes: bool
    places: bool
    iou: float

    @property
    def ok(self) -> bool:
        """Every demand is met."""
        return self.background and self.count and self.colors and self.shapes and self.places


def read(image: Image.Image | NDArray[Any]) -> Reading:
    """Read a square picture: a PIL image, bytes (h, w, 3), or floats in 0..1."""
    pixels = _to_floats(image)
    edge = max(1, len(pixels) // 32)
    border = np.concatenate(
        [part.reshape(-1, 3) for part in (pixels[:edge], pixels[-edge:], pixels[:, :edge], pixels[:, -edge:])]
    )
    background = np.median(border, axis=0)
    lab = to_lab(pixels)
    differs = np.linalg.norm(lab - to_lab(background), axis=-1) > DIFFERENT
    smallest = max(8.0, MIN_AREA * differs.size)
    things = [
        _see(pixels, part, background)
        for region in _regions(differs)
        if region.sum() >= smallest
        for part in _split_touching(region, lab)
        if part.sum() >= smallest
    ]
    things.sort(key=lambda thing: -thing.area)
    return Reading(color_name(background), _rgb(background), tuple(things))


def agrees(reading: Reading, expected: Scene | Expectation) -> Verdict:
    """Hold a reading against a scene, or against what a prompt asks for."""
    wanted = expectation.of_scene(expected) if isinstance(expected, Scene) else expected
    background = wanted.background in (None, reading.background)
    count = len(reading.things) == len(wanted.things)
    if len(reading.things) < len(wanted.things):
        return Verdict(background, False, False, False, False, 0.0)
    if len(wanted.things) == 2:
        return _agrees_on_two(reading, wanted, background, count)
    if not wanted.things:
        return Verdict(background, count, True, True, True, 1.0)
    seen, thing = reading.things[0], wanted.things[0]
    return Verdict(
        background,
        count,
        thing.color in (None, seen.color),
        thing.shape in (None, seen.shape) and seen.iou >= MIN_IOU,
        thing.place is None or _is_at(seen, thing.place),
        seen.iou,
    )


def agrees_with_prompt(image: Image.Image | NDArray[Any], prompt: str) -> Verdict:
    """Whether a picture shows what a simple prompt asks for, such as "a red circle on a blue background"."""
    return agrees(read(image), expectation.of_prompt(prompt))


def color_name(rgb: FloatArray) -> str:
    """The nearest of the ten colours (CIELAB) to an sRGB colour in 0..1."""
    return COLOR_NAMES[int(np.linalg.norm(PALETTE_LAB - to_lab(rgb), axis=-1).argmin())]


def to_lab(rgb: FloatArray) -> FloatArray:
    """Convert sRGB in 0..1 (..., 3) to CIELAB under D65 (IEC 61966-2-1, CIE 15)."""
    rgb = np.clip(rgb, 0, 1)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ RGB_TO_XYZ.T / WHITE
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.asarray(np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1))


RGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.9505, 1.0, 1.089])
PALETTE_LAB = to_lab(PALETTE)


def _to_floats(image: Image.Image | NDArray[Any]) -> FloatArray:
    array = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"a picture is (height, width, 3), not {array.shape}")
    return array.astype(np.float64) / (255 if array.dtype == np.uint8 else 1)


def _rgb(color: FloatArray) -> RGB:
    red, green, blue = color.tolist()
    return red, green, blue


def _agrees_on_two(reading: Reading, wanted: Expectation, background: bool, count: bool) -> Verdict:
    colors = {thing.color for thing in reading.things}
    found = [_find(reading, thing) for thing in wanted.things]
    first, second = found
    if first is None or second is None:
        ordered = False
    elif wanted.relation == "above":
        ordered = first.y < second.y - ORDER_MARGIN
    else:
        ordered = first.x < second.x - ORDER_MARGIN
    return Verdict(
        background,
        count,
        all(thing.color is None or thing.color in colors for thing in wanted.things),
        first is not None and second is not None,
        ordered,
        min(seen.iou for seen in reading.things[:2]),
    )


def _find(reading: Reading, wanted: ExpectedThing) -> SeenThing | None:
    for seen in reading.things:
        if wanted.color in (None, seen.color) and wanted.shape in (None, seen.shape) and seen.iou >= MIN_IOU:
            return seen
    return None


def _is_at(seen: SeenThing, place: str) -> bool:
    x, y = PLACES[place]
    return abs(seen.x - x) < PLACE_TOLERANCE and abs(seen.y - y) < PLACE_TOLERANCE


def _see(pixels: FloatArray, region: Mask, background: FloatArray) -> SeenThing:
    """Name one region. Its outline is where a pixel is as far from the object's colour as from the background's."""
    color = np.median(pixels[_core(region)], axis=0)
    nearer = ((pixels - color) ** 2).sum(-1) < ((pixels - background) ** 2).sum(-1)
    mask = region & nearer
    if not mask.any():
        mask = region
    shape, iou = _best_shape(mask)
    rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    side = len(mask)
    x, y = (float(line[0] + line[-1] + 1) / 2 / side for line in (columns, rows))
    return SeenThing(color_name(color), shape, iou, x, y, float(mask.mean()), _rgb(color))


def _core(region: Mask) -> Mask:
    """The region without its blended edge, as long as something is left."""
    core = region
    for _ in range(max(1, len(region) // 64)):
        inner = core.copy()
        inner[1:] &= core[:-1]
        inner[:-1] &= core[1:]
        inner[:, 1:] &= core[:, :-1]
        inner[:, :-1] &= core[:, 1:]
        if inner.sum() < 6:
            break
        core = inner
    return core


def _regions(mask: Mask) -> Iterator[Mask]:
    """The 4-connected regions of a mask: runs along rows, joined where runs of neighbouring rows overlap."""
    parents: list[int] = []
    runs: list[tuple[int, int, int]] = []
    above: list[int] = []
    for row, line in enumerate(mask):
        steps = np.flatnonzero(np.diff(np.concatenate(([0], line.view(np.int8), [0]))))
        here = []
        for start, end in zip(steps[::2].tolist(), steps[1::2].tolist(), strict=True):
            index = len(runs)
            runs.append((row, start, end))
            parents.append(index)
            here.append(index)
            for other in above:
                if runs[other][1] < end and start < runs[other][2]:
                    parents[_root(parents, other)] = _root(parents, index)
        above = here
    regions: dict[int, Mask] = {}
    for index, (row, start, end) in enumerate(runs):
        region = regions.setdefault(_root(parents, index), np.zeros_like(mask))
        region[row, start:end] = True
    yield from regions.values()


def _root(parents: list[int], index: int) -> int:
    while parents[index] != index:
        parents[index] = parents[parents[index]]
        index = parents[index]
    return index


def _split_touching(region: Mask, lab: FloatArray) -> list[Mask]:
    """The region, or the largest parts of different palette colours where two objects touch."""
    nearest = np.linalg.norm(lab[region][:, None] - PALETTE_LAB, axis=-1).argmin(-1)
    shares = np.bincount(nearest, minlength=len(PALETTE_LAB)) / len(nearest)
    colors = np.flatnonzero(shares > SPLIT_SHARE)
    if len(colors) < 2:
        return [region]
    parts = []
    for color in colors:
        part = np.zeros_like(region)
        part[region] = nearest == color
        parts.append(max(_regions(part), key=np.count_nonzero))
    return parts


def _best_shape(mask: Mask) -> tuple[str, float]:
    """The shape with the highest IoU. Each is first laid into the region's box, the three best are then adjusted."""
    rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    window = mask[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2]
    x = np.arange(max(0, left - 2), max(0, left - 2) + window.shape[1]) + 0.5
    y = np.arange(max(0, top - 2), max(0, top - 2) + window.shape[0]) + 0.5
    fits = []
    for shape in SHAPES:
        x0, x1, y0, y1 = EXTENTS[shape]
        radius = ((right - left) / (x1 - x0) + (bottom - top) / (y1 - y0)) / 2
        pose = ((left + right) / 2 - radius * (x0 + x1) / 2, (top + bottom) / 2 - radius * (y0 + y1) / 2, radius)
        fits.append((_iou(shape, pose, x, y, window), shape, pose))
    fits.sort(reverse=True)
    return max(((shape, _adjust(shape, pose, x, y, window)) for _, shape, pose in fits[:3]), key=lambda fit: fit[1])


Pose = tuple[float, float, float]
"""Centre x, centre y and radius, in pixels."""


def _adjust(shape: str, pose: Pose, x: FloatArray, y: FloatArray, window: Mask) -> float:
    """Hill-climb centre and radius in steps of 1, then half a pixel; returns the best IoU."""
    best = _iou(shape, pose, x, y, window)
    for step in (1.0, 0.5):
        for axis in (2, 0, 1):
            for direction in (step, -step):
                moved = tuple(value + direction * (axis == i) for i, value in enumerate(pose))
                candidate: Pose = (moved[0], moved[1], max(1.0, moved[2]))
                score = _iou(shape, candidate, x, y, window)
                if score > best:
                    best, pose = score, candidate
    return best


def _iou(shape: str, pose: Pose, x: FloatArray, y: FloatArray, window: Mask) -> float:
    center_x, center_y, radius = pose
    drawn = signed_distance(shape, ((x - center_x) / radius)[None, :], ((y - center_y) / radius)[:, None]) < 0
    return float((drawn & window).sum() / max(1, (drawn | window).sum()))


def _extents(shape: str) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of the unit shape."""
    axis = (np.arange(400) + 0.5) / 100 - 2
    inside = signed_distance(shape, axis[None, :], axis[:, None]) < 0
    columns, rows = axis[inside.any(0)], axis[inside.any(1)]
    return float(columns[0]), float(columns[-1]), float(rows[0]), float(rows[-1])


EXTENTS = {shape: _extents(shape) for shape in SHAPES}
