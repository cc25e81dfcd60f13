"""The world that the shipped model knows: coloured shapes on coloured backgrounds, drawn from signed distances.

A :class:`Scene` says what a picture shows; :func:`draw` turns it into pixels; :func:`sample_scene` draws one at random,
either from the combinations that training may see or from those that are held out of it. Captions are in
:mod:`serve.shapes.captions`. Only numpy: the judge and the tests use this file without torch.

Coordinates are fractions of the picture's side: x to the right, y downwards, (0.5, 0.5) the middle.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
RGB = tuple[float, float, float]
Relation = Literal["left of", "above"]

IMAGE_SIZE = 128
"""Side of a picture in pixels."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "orange": (245, 135, 20),
    "yellow": (250, 225, 40),
    "green": (35, 160, 60),
    "cyan": (60, 210, 220),
    "blue": (35, 70, 215),
    "purple": (125, 45, 175),
    "pink": (250, 150, 195),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
COLOR_NAMES: tuple[str, ...] = tuple(COLORS)
PALETTE: FloatArray = np.array([COLORS[name] for name in COLOR_NAMES], np.float32) / 255
"""The ten colours, (10, 3), sRGB in 0..1."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "ring", "heart", "cross", "diamond")

SIZES: dict[str, tuple[float, float]] = {"small": (0.12, 0.16), "medium": (0.20, 0.27), "large": (0.33, 0.39)}
"""Range of the radius for each word of size."""

PLACES: dict[str, tuple[float, float]] = {
    "center": (0.5, 0.5),
    "left": (0.28, 0.5),
    "right": (0.72, 0.5),
    "top": (0.5, 0.28),
    "bottom": (0.5, 0.72),
    "top left": (0.28, 0.28),
    "top right": (0.72, 0.28),
    "bottom left": (0.28, 0.72),
    "bottom right": (0.72, 0.72),
}
PLACE_NAMES: tuple[str, ...] = tuple(PLACES)

NEVER_DRAWN_PAIRS: frozenset[tuple[str, str]] = frozenset(
    {
        ("purple", "heart"),
        ("green", "star"),
        ("orange", "ring"),
        ("cyan", "triangle"),
        ("pink", "square"),
        ("yellow", "cross"),
    }
)
"""(colour, shape) pairs that no training picture shows, on any background."""

HELD_OUT_SHARE = 5
"""One combination in this many is held out of training, chosen by its hash."""

PLACE_JITTER = 0.012
COLOR_JITTER = 0.03


@dataclass(frozen=True)
class Thing:
    """One object: its words (colour, shape, size, place) and its geometry (centre, radius, sRGB colour in 0..1)."""

    color: str
    shape: str
    size: str
    place: str
    x: float
    y: float
    radius: float
    rgb: RGB


@dataclass(frozen=True)
class Scene:
    """What a picture shows: a background and one or two things.

    With two things, ``relation`` says how the first lies to the second; with one it is None. ``fade_to`` is the colour
    of the lower edge of a shaded background (only the autoencoder's training uses it).
    """

    background: str
    background_rgb: RGB
    things: tuple[Thing, ...]
    relation: Relation | None = None
    fade_to: RGB | None = None


def signed_distance(shape: str, x: FloatArray, y: FloatArray) -> FloatArray:
    """Distance to the outline of the unit shape, negative inside; x and y broadcast, y points down.

    The formulas follow Inigo Quilez, "2D distance functions"; the straight-edged ones keep mitred corners outside,
    because a picture needs the sign and the first pixel only.
    """
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.asarray(np.hypot(x, y) - 1)
    if shape == "square":
        return np.asarray(np.maximum(ax, ay) - 0.87)
    if shape == "diamond":
        return np.asarray((1.35 * ax + ay - 1.1) / 1.68)
    if shape == "triangle":
        return np.asarray(np.maximum(y - 0.78, (1.78 * ax - (y + 1)) / 2.042))
    if shape == "ring":
        return np.asarray(np.abs(np.hypot(x, y) - 0.74) - 0.26)
    if shape == "cross":
        return np.asarray(np.minimum(np.maximum(ax - 1, ay - 0.34), np.maximum(ax - 0.34, ay - 1)))
    if shape == "star":
        return _star_distance(x, y)
    if shape == "heart":
        return _heart_distance(ax, y)
    raise KeyError(shape)


def _star_distance(x: FloatArray, y: FloatArray) -> FloatArray:
    """Five points: fold the plane into one tenth, then the distance to one edge."""
    sector = 2 * math.pi / 5
    angle = np.arctan2(x, -y)
    angle = np.abs((angle + sector / 2) % sector - sector / 2)
    radius = np.hypot(x, y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    tip, notch = 1.12, 0.47
    edge_x, edge_y = notch * math.cos(sector / 2) - tip, notch * math.sin(sector / 2)
    return np.asarray(((along - tip) * edge_y - across * edge_x) / math.hypot(edge_x, edge_y))


def _heart_distance(ax: FloatArray, y: FloatArray) -> FloatArray:
    """Quilez' sdHeart, scaled to the unit shape; ``ax`` is |x|."""
    px, py = ax * 0.58, 0.52 - y * 0.58
    lobe = np.hypot(px - 0.25, py - 0.75) - math.sqrt(2) / 4
    diagonal = 0.5 * np.maximum(px + py, 0)
    nearest = np.minimum(px**2 + (py - 1) ** 2, (px - diagonal) ** 2 + (py - diagonal) ** 2)
    body = np.sqrt(nearest) * np.sign(px - py)
    return np.asarray(np.where(px + py > 1, lobe, body) / 0.58)


def coverage(thing: Thing, size: int, left: int = 0, top: int = 0, window: int | None = None) -> FloatArray:
    """How much of each pixel ``thing`` covers, 0..1, in the window (side ``window``) of a picture of side ``size``."""
    window = window or size
    x = (np.arange(left, left + window, dtype=np.float32) + 0.5) / size - thing.x
    y = (np.arange(top, top + window, dtype=np.float32) + 0.5) / size - thing.y
    distance = signed_distance(thing.shape, (x / thing.radius)[None, :], (y / thing.radius)[:, None])
    return np.asarray(np.clip(0.5 - distance * (thing.radius * size), 0, 1))


def render(scene: Scene, size: int = IMAGE_SIZE, left: int = 0, top: int = 0, window: int | None = None) -> FloatArray:
    """The picture, or a window of it: (window, window, 3) float32, sRGB in 0..1."""
    window = window or size
    image: FloatArray = np.empty((window, window, 3), np.float32)
    image[:] = scene.background_rgb
    if scene.fade_to is not None:
        depth = (np.arange(top, top + window, dtype=np.float32) / size)[:, None, None]
        image = image * (1 - depth) + np.asarray(scene.fade_to, np.float32) * depth
    for thing in scene.things:
        alpha = coverage(thing, size, left, top, window).astype(np.float32)[..., None]
        image = image * (1 - alpha) + alpha * np.asarray(thing.rgb, np.float32)
    return image


def draw(scene: Scene, size: int = IMAGE_SIZE) -> NDArray[np.uint8]:
    """The picture as (size, size, 3) bytes."""
    return np.asarray((render(scene, size) * 255).round().clip(0, 255), np.uint8)


def is_held_out(color: str, shape: str, background: str) -> bool:
    """Whether a one-object picture of this combination is kept out of training."""
    return (color, shape) in NEVER_DRAWN_PAIRS or _chosen_by_hash(color, shape, background)


def is_pair_held_out(first: Thing, second: Thing) -> bool:
    """Whether a picture of these two things together, in either order, is kept out of training."""
    if any((thing.color, thing.shape) in NEVER_DRAWN_PAIRS for thing in (first, second)):
        return True
    return _chosen_by_hash(*sorted((first.color + first.shape, second.color + second.shape)))


def may_train_on(scene: Scene) -> bool:
    """Whether training may see the picture: no held-out triple, and no held-out pair of things."""
    if any(is_held_out(thing.color, thing.shape, scene.background) for thing in scene.things):
        return False
    return len(scene.things) < 2 or not is_pair_held_out(scene.things[0], scene.things[1])


def _chosen_by_hash(*words: str) -> bool:
    return int(hashlib.md5("|".join(words).encode(), usedforsecurity=False).hexdigest(), 16) % HELD_OUT_SHARE == 0


def shade(color: str, rng: np.random.Generator) -> RGB:
    """A shade that still goes by the colour's name: the palette's entry with a little noise."""
    noisy = PALETTE[COLOR_NAMES.index(color)] + rng.normal(0, COLOR_JITTER, 3)
    red, green, blue = np.clip(noisy, 0, 1).tolist()
    return red, green, blue


def sample_scene(rng: np.random.Generator, *, held_out: bool = False, two: bool | None = None) -> Scene:
    """A random scene, wholly inside training's combinations, or (``held_out``) outside of them.

    ``two`` fixes the number of things; None draws two with probability 0.4.
    """
    if two is None:
        two = bool(rng.random() < 0.4)
    while True:
        scene = _any_pair(rng) if two else _any_single(rng)
        if scene is None:
            continue
        if held_out:
            if _is_test_scene(scene):
                return scene
        elif may_train_on(scene):
            return scene


def _is_test_scene(scene: Scene) -> bool:
    if len(scene.things) == 1:
        return is_held_out(scene.things[0].color, scene.things[0].shape, scene.background)
    return is_pair_held_out(scene.things[0], scene.things[1])


def _any_single(rng: np.random.Generator) -> Scene | None:
    background, color = _pick(COLOR_NAMES, rng), _pick(COLOR_NAMES, rng)
    if color == background:
        return None
    shape = _pick(SHAPES, rng)
    roll = rng.random()
    size = "small" if roll < 0.2 else "medium" if roll < 0.75 else "large"
    place = "center" if size == "large" or rng.random() < 0.5 else _pick(PLACE_NAMES, rng)
    thing = _place(color, shape, size, place, PLACES[place], rng.uniform(*SIZES[size]), rng)
    return Scene(background, shade(background, rng), (thing,))


def _any_pair(rng: np.random.Generator) -> Scene | None:
    background, first, second = (_pick(COLOR_NAMES, rng) for _ in range(3))
    if len({background, first, second}) < 3:
        return None
    relation: Relation = "left of" if rng.random() < 0.5 else "above"
    centers = ((0.27, 0.5), (0.73, 0.5)) if relation == "left of" else ((0.5, 0.27), (0.5, 0.73))
    radius = rng.uniform(0.16, 0.21)
    things = tuple(
        _place(color, _pick(SHAPES, rng), "medium", "", center, radius * rng.uniform(0.93, 1.07), rng)
        for color, center in zip((first, second), centers, strict=True)
    )
    return Scene(background, shade(background, rng), things, relation)


def _place(
    color: str, shape: str, size: str, place: str, center: tuple[float, float], radius: float, rng: np.random.Generator
) -> Thing:
    x, y = (float(c + rng.normal(0, PLACE_JITTER)) for c in center)
    return Thing(color, shape, size, place, x, y, float(radius), shade(color, rng))


def _pick(words: tuple[str, ...], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]
