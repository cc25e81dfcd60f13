"""What a picture should show, as words: taken from a scene, or read out of a simple prompt."""

import re
from dataclasses import dataclass

from serve.shapes.captions import SYNONYMS
from serve.shapes.draw import COLOR_NAMES, PLACE_NAMES, SHAPES, Relation, Scene

_MEANING: dict[str, str] = {word: name for name, words in SYNONYMS.items() for word in words}
_MEANING |= {name: name for name in (*COLOR_NAMES, *SHAPES)} | {"shape": ""}
_COLOR = "|".join(w for w, name in _MEANING.items() if name in COLOR_NAMES)
_SHAPE = "|".join(sorted((w for w, name in _MEANING.items() if name not in COLOR_NAMES), key=len, reverse=True))
_BACKGROUND = (
    re.compile(rf"\b({_COLOR}) (?:background|backdrop)\b"),
    re.compile(rf"\bbackground is ({_COLOR})\b"),
    re.compile(rf"\b(?:on|over|against) (?:an? )?({_COLOR})\b(?! (?:{_SHAPE})\b)"),
)
_THING = re.compile(rf"\b(?:({_COLOR}) )?({_SHAPE})\b(?: that is ({_COLOR})\b)?")
_PLACE = re.compile(rf"\b({'|'.join(sorted(PLACE_NAMES, key=len, reverse=True))}|middle|centered)\b")
_SECOND_IS_FIRST = re.compile(r"\b(?:right of|below|under)\b")
_STACKED = re.compile(r"\b(?:above|on top of|over|below|under)\b")


@dataclass(frozen=True)
class ExpectedThing:
    """One object; None where nothing is asked."""

    color: str | None
    shape: str | None
    place: str | None = None


@dataclass(frozen=True)
class Expectation:
    """A background (None: any), the objects, and for two of them how the first lies to the second."""

    background: str | None
    things: tuple[ExpectedThing, ...]
    relation: Relation | None = None


def of_scene(scene: Scene) -> Expectation:
    """Everything that the scene says."""
    things = tuple(ExpectedThing(thing.color, thing.shape, thing.place or None) for thing in scene.things)
    return Expectation(scene.background, things, scene.relation)


def of_prompt(prompt: str) -> Expectation:
    """What a prompt in the captions' language asks for, such as "a red circle on a blue background".

    Words that it does not know ask for nothing. Raises ValueError when neither an object nor a background is named.
    """
    text = " ".join(prompt.lower().replace(",", " , ").split())
    background = None
    for pattern in _BACKGROUND:
        if found := pattern.search(text):
            background = _MEANING[found[1]]
            text = f"{text[: found.start()]} . {text[found.end() :]}"
            break
    found_things = list(_THING.finditer(text))[:2]
    if not found_things and background is None:
        raise ValueError(f"no object and no background that the judge knows in {prompt!r}")
    things = [
        ExpectedThing(_name(found[1] or found[3]), _name(found[2]), _place(text) if len(found_things) == 1 else None)
        for found in found_things
    ]
    if len(things) < 2:
        return Expectation(background, tuple(things))
    link = text[found_things[0].end() : found_things[1].start()]
    if _SECOND_IS_FIRST.search(link):
        things.reverse()
    return Expectation(background, tuple(things), "above" if _STACKED.search(link) else "left of")


def _name(word: str | None) -> str | None:
    return _MEANING[word] or None if word else None


def _place(text: str) -> str | None:
    found = _PLACE.search(text)
    if found is None:
        return None
    return "center" if found[1] in ("middle", "centered") else found[1]
