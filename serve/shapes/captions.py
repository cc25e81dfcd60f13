"""Scenes -> sentences: many phrasings of the same picture, and the two ways in which prompts mix colours.

Most training rows are a scene and one of its captions. A tenth teaches arithmetic on embeddings, which the server
offers as prompt syntax: a :class:`Phrase` may blend two captions, or scale the embedding of one word; the scene then
shows the colour that this should give.
"""

import random
from dataclasses import dataclass, replace

import numpy as np

from serve.shapes.draw import COLOR_NAMES, PALETTE, RGB, Scene, Thing, is_held_out, sample_scene

SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("circle",) * 4 + ("disc", "round shape"),
    "ring": ("ring",) * 4 + ("donut",),
    "square": ("square",) * 4 + ("box",),
    "cross": ("cross",) * 4 + ("plus sign",),
    "diamond": ("diamond",) * 5 + ("rhombus",),
    "purple": ("purple",) * 6 + ("violet",),
    "cyan": ("cyan",) * 6 + ("turquoise",),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "tiny", "little"),
    "medium": ("medium",),
    "large": ("large", "large", "big", "huge"),
}
QUALITY_WORDS: tuple[str, ...] = (
    "high quality",
    "flat design",
    "vector art",
    "simple",
    "clean",
    "minimal",
    "4k",
    "best quality",
    "sharp",
    "icon",
    "poster",
    "geometric",
    "bright",
    "digital art",
    "masterpiece",
)
OPENINGS: tuple[str, ...] = (
    "a picture of ",
    "an image of ",
    "a drawing of ",
    "a photo of ",
    "an illustration of ",
    "there is ",
    "a painting of ",
)
BACKGROUND_PHRASES: tuple[str, ...] = (
    "on {a} background",
    "on {a} background",
    "against {a} background",
    "on {a} backdrop",
    "over {a} background",
    "on {w}",
    ", {w} background",
)
LEADING_BACKGROUNDS: tuple[str, ...] = (
    "{a} background with {core} {place}",
    "{w} background, {core} {place}",
    "on {a} background, {core} {place}",
)
PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "center": ("in the center", "in the middle", "centered"),
    "left": ("on the left", "at the left", "to the left"),
    "right": ("on the right", "at the right", "to the right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
}
CORNER_PHRASES: tuple[str, ...] = ("in the {p} corner", "at the {p}", "in the {p}")
LEFT_PHRASES: tuple[str, ...] = (
    "{A} to the left of {B}",
    "{A} left of {B}",
    "{A} on the left and {B} on the right",
    "{A} next to {B}",
    "{A} and {B}",
    "{A} beside {B}",
)
RIGHT_PHRASES: tuple[str, ...] = ("{B} to the right of {A}",)
ABOVE_PHRASES: tuple[str, ...] = ("{A} above {B}", "{A} on top of {B}", "{A} above {B}", "{A} over {B}")
BELOW_PHRASES: tuple[str, ...] = ("{B} below {A}", "{B} under {A}")
TWO_TONE_PHRASES: tuple[str, ...] = ("{0} and {1}", "{0} {1}", "{0}-{1}")


@dataclass(frozen=True)
class Phrase:
    """What the text side of one training row says.

    The conditioning is ``(1 - mix) * embed(text) + mix * embed(other)``; then the embedding of ``word`` (if any) is
    moved away from the empty prompt's by the factor ``weight``.
    """

    text: str
    other: str = ""
    mix: float = 0.0
    word: str = ""
    weight: float = 1.0


def caption(scene: Scene, rng: random.Random, *, complete: bool = False) -> str:
    """One of many sentences for the scene. Unless ``complete``, attributes may go unsaid."""
    drop = (lambda _share: False) if complete else (lambda share: rng.random() < share)
    background = _word(scene.background, rng)
    told_background = not drop(0.15)
    ground = rng.choice(BACKGROUND_PHRASES).format(a=_article(background), w=background) if told_background else ""
    if len(scene.things) == 2:
        text = f"{_pair(scene, rng)} {ground}"
    else:
        thing = scene.things[0]
        if told_background and drop(0.03):
            return rng.choice(("{w} background", "{a} background", "{a} backdrop")).format(
                a=_article(background), w=background
            )
        if drop(0.03):
            return rng.choice((thing.color, thing.shape, f"{thing.color} {thing.shape}"))
        core = _core(thing, rng, nameless=drop(0.06), colorless=drop(0.08), sizeless=drop(0.35))
        place = "" if thing.place != "center" and drop(0.25) else _place_phrase(thing.place, rng)
        text = _arrange(core, place, ground, background, rng)
    return _tidy(_dress(text, rng))


def _core(thing: Thing, rng: random.Random, *, nameless: bool, colorless: bool, sizeless: bool) -> str:
    words = []
    said = rng.random() < 0.08 if thing.size == "medium" else not sizeless
    if said:
        words.append(rng.choice(SIZE_WORDS[thing.size]))
    color_last = rng.random() < 0.08
    if not colorless and not color_last:
        words.append(_word(thing.color, rng))
    words.append("shape" if nameless else _word(thing.shape, rng))
    core = " ".join(words)
    if rng.random() < 0.85:
        core = _article(core)
    return core if colorless or not color_last else f"{core} that is {_word(thing.color, rng)}"


def _place_phrase(place: str, rng: random.Random) -> str:
    if place == "center" and rng.random() >= 0.12:
        return ""
    phrases = PLACE_PHRASES.get(place) or CORNER_PHRASES
    return rng.choice(phrases).format(p=place)


def _arrange(core: str, place: str, ground: str, background: str, rng: random.Random) -> str:
    roll = rng.random()
    if ground and roll < 0.12:
        form = rng.choice(LEADING_BACKGROUNDS)
        return form.format(a=_article(background), w=background, core=core, place=place)
    if ground and roll < 0.17:
        return f"{core} {place}, the background is {background}"
    if place and roll < 0.4:
        return f"{core} {ground} {place}"
    return f"{core} {place} {ground}"


def _pair(scene: Scene, rng: random.Random) -> str:
    first, second = (_article(f"{_word(t.color, rng)} {_word(t.shape, rng)}") for t in scene.things)
    usual = rng.random() < 0.7
    if scene.relation == "left of":
        form = rng.choice(LEFT_PHRASES if usual else RIGHT_PHRASES)
    else:
        form = rng.choice(ABOVE_PHRASES if usual else BELOW_PHRASES)
    return form.format(A=first, B=second)


def _dress(text: str, rng: random.Random) -> str:
    if rng.random() < 0.2 and not text.startswith("o"):
        text = rng.choice(OPENINGS) + text
    if rng.random() < 0.15:
        return f"{text}, " + ", ".join(rng.sample(QUALITY_WORDS, rng.randint(1, 3)))
    return f"{rng.choice(QUALITY_WORDS)}, {text}" if rng.random() < 0.05 else text


def _word(name: str, rng: random.Random) -> str:
    return rng.choice(SYNONYMS[name]) if name in SYNONYMS else name


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _tidy(text: str) -> str:
    return " ".join(text.split()).replace(" ,", ",")


def held_out_prompts(n: int, two: bool = False, seed: int = 77) -> list[tuple[str, Scene]]:
    """``n`` complete captions of combinations that training never saw, each with its scene; the same for a seed."""
    prompts = []
    for index in range(n):
        scene = sample_scene(np.random.default_rng([seed, int(two), index]), held_out=True, two=two)
        prompts.append((caption(scene, random.Random(f"{seed}/{two}/{index}"), complete=True), scene))
    return prompts


def training_row(rng: np.random.Generator) -> tuple[Scene, Phrase | None]:
    """A scene for training; with a phrase where the scene shows a mixed colour, without where any caption will do."""
    roll = rng.random()
    if roll < 0.08:
        return sample_blend(rng)
    if roll < 0.12:
        return sample_two_tone(rng)
    return sample_scene(rng), None


def sample_blend(rng: np.random.Generator) -> tuple[Scene, Phrase]:
    """Two captions that differ in one colour, blended; the scene shows the colour in between."""
    scene, other_color, of_background = _recolorable(rng)
    thing = scene.things[0]
    words = random.Random(int(rng.integers(2**32)))
    state = words.getstate()
    first = caption(scene, words, complete=True)
    other = (
        replace(scene, background=other_color)
        if of_background
        else replace(scene, things=(replace(thing, color=other_color),))
    )
    words.setstate(state)
    second = caption(other, words, complete=True)
    mix = float(rng.uniform(0, 1))
    before = scene.background if of_background else thing.color
    return _recolor(scene, between(before, other_color, mix), of_background), Phrase(first, second, mix)


def sample_two_tone(rng: np.random.Generator) -> tuple[Scene, Phrase]:
    """Draw "a red blue circle": halfway between; a weight on one of the words shifts the colour towards it.

    A weight of 2 reaches the word's own colour. Below 1 the server blends with the prompt without the word (as
    Compel does), so here too.
    """
    scene, other_color, _ = _recolorable(rng, of_background=False)
    thing = scene.things[0]
    names = [thing.color, other_color]
    words = random.Random(int(rng.integers(2**32)))
    state = words.getstate()
    tone = words.choice(TWO_TONE_PHRASES).format(*(names if rng.random() < 0.5 else names[::-1]))
    text = _two_tone_caption(scene, tone, words)
    if rng.random() < 0.5:
        weight = float(rng.uniform(1, 2))
        return (
            _recolor(scene, between(other_color, thing.color, 0.5 * weight), False),
            Phrase(text, word=thing.color, weight=weight),
        )
    words.setstate(state)
    words.choice(TWO_TONE_PHRASES)
    mix = float(rng.uniform(0, 1))
    without = _two_tone_caption(scene, thing.color, words)
    return _recolor(scene, between(other_color, thing.color, 0.5 + 0.5 * mix), False), Phrase(text, without, mix)


def _two_tone_caption(scene: Scene, tone: str, rng: random.Random) -> str:
    thing = scene.things[0]
    size = "" if thing.size == "medium" else thing.size
    core = _article(f"{size} {tone} {thing.shape}".strip())
    place = _place_phrase(thing.place, rng)
    return _tidy(f"{core} {place} on {_article(scene.background)} background")


def _recolorable(rng: np.random.Generator, of_background: bool | None = None) -> tuple[Scene, str, bool]:
    """A one-object scene and another colour that it (or its background) may take without leaving training."""
    if of_background is None:
        of_background = bool(rng.random() < 0.3)
    while True:
        scene = sample_scene(rng, two=False)
        thing = scene.things[0]
        color = COLOR_NAMES[int(rng.integers(len(COLOR_NAMES)))]
        if color in (scene.background, thing.color):
            continue
        triple = (thing.color, thing.shape, color) if of_background else (color, thing.shape, scene.background)
        if not is_held_out(*triple):
            return scene, color, of_background


def between(first: str, second: str, share: float) -> RGB:
    """The colour ``share`` of the way from one palette entry to another, in sRGB."""
    a, b = (PALETTE[COLOR_NAMES.index(name)] for name in (first, second))
    red, green, blue = ((1 - share) * a + share * b).tolist()
    return red, green, blue


def _recolor(scene: Scene, rgb: RGB, of_background: bool) -> Scene:
    if of_background:
        return replace(scene, background_rgb=rgb)
    return replace(scene, things=(replace(scene.things[0], rgb=rgb),))
