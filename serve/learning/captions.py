"""What is said of the pictures while a concept is learned from them: texts in which `{}` stands for the concept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from serve.errors import OperatorError

Kind = Literal["object", "style"]

PLACE = "{}"
MAX_CHARACTERS = 1000

CAPTIONS: Mapping[Kind, tuple[str, ...]] = {
    "object": (
        "a photo of a {}",
        "a rendering of a {}",
        "a cropped photo of the {}",
        "the photo of a {}",
        "a photo of a clean {}",
        "a dark photo of the {}",
        "a photo of my {}",
        "a photo of the cool {}",
        "a close-up photo of a {}",
        "a bright photo of the {}",
        "a cropped photo of a {}",
        "a photo of the {}",
        "a good photo of the {}",
        "a photo of one {}",
        "a close-up photo of the {}",
        "a rendition of the {}",
        "a photo of the nice {}",
        "a good photo of a {}",
    ),
    "style": (
        "a painting in the style of {}",
        "a rendering in the style of {}",
        "a cropped painting in the style of {}",
        "the painting in the style of {}",
        "a clean painting in the style of {}",
        "a dark painting in the style of {}",
        "a picture in the style of {}",
        "a cool painting in the style of {}",
        "a close-up painting in the style of {}",
        "a bright painting in the style of {}",
        "a good painting in the style of {}",
        "a rendition in the style of {}",
    ),
}
"""For pictures of which nothing else is said: of those that the authors trained with (supplementary material of the
paper), the ones that suit any subject."""


def checked(text: str, place: str) -> str:
    """The caption on one line. Raises OperatorError that names `place` where it does not say where the concept stands,
    or is no caption at all."""
    line = " ".join(text.split())
    if PLACE not in line:
        raise OperatorError(f"{place}: the caption {_short(line)!r} lacks {PLACE}, which stands for the concept", place)
    if len(line) > MAX_CHARACTERS or not line.isprintable():
        raise OperatorError(f"{place}: a caption is one line of at most {MAX_CHARACTERS} characters", place)
    return line


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"
