"""Where in a client's text something stands, for errors that say so, and the numbers that may stand there."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass

from serve.errors import InvalidRequest
from serve.prompts.ast import When

MAX_CHARACTERS = 16_384
"""Of one text, whatever the doors' own limit is: the slowest text of this length is read in less than 50 ms."""
MAX_WEIGHT = 1000.0
"""Largest weight, either sign: far beyond any use, far below what overflows in half precision arithmetic."""
MAX_PARTS = 64
"""Most prompts that one construct puts together, as many as a request may have texts."""
_LAST_STEP = 1e6
"""No number of steps is larger; it keeps what a client wrote finite."""

NUMBER = r"[+-]?(?:[.0-9]+(?:[eE][+-]?[0-9]+)?|(?i:nan|inf|infinity))"
"""What is taken for a number; `weight` refuses those that are none, or not finite."""
CONCEPT = "[A-Za-z0-9_-]{1,64}"
"""The name of one."""
MOMENT = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Source:
    """A text to parse, and where it stands: at `begin` of the text of `inside`, which is None for a field's own text.

    `dropped` are the positions in `text`, rising, before which `inside` has an escape that `text` has no longer;
    `added` those before which `text` has a blank that `inside` never had.
    """

    text: str
    field: str
    begin: int = 0
    dropped: tuple[int, ...] = ()
    added: tuple[int, ...] = ()
    inside: Source | None = None

    def place(self, at: int) -> int:
        """The position in the field's own text."""
        at = self.begin + at + bisect_right(self.dropped, at) - bisect_right(self.added, at)
        return at if self.inside is None else self.inside.place(at)

    def part(self, begin: int, end: int) -> Source:
        return Source(self.text[begin:end], self.field, begin, inside=self)

    def refuse(self, at: int, reason: str) -> InvalidRequest:
        """To be raised: names the field and the character, counted from 1."""
        return InvalidRequest(f"{self.field}: character {self.place(at) + 1}: {reason}", self.field)


def checked(text: str, field: str) -> Source:
    """Raises InvalidRequest for what no prompt may hold, whatever it is written in."""
    source = Source(text, field)
    if len(text) > MAX_CHARACTERS:
        raise source.refuse(MAX_CHARACTERS, f"a prompt has at most {MAX_CHARACTERS} characters")
    if (found := _UNPRINTABLE.search(text)) is not None:
        raise source.refuse(found.start(), "a control character, or half of a surrogate pair")
    return source


def weight(source: Source, at: int, written: str) -> float:
    """The number `written` at `at`; raises InvalidRequest where it is none or out of range."""
    try:
        value = float(written)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise source.refuse(at, f"the weight {written[:20] or 'of nothing'} is not a number")
    return in_range(source, at, value)


def in_range(source: Source, at: int, value: float) -> float:
    if not abs(value) <= MAX_WEIGHT:  # which NaN is not either
        raise source.refuse(at, f"a weight is beyond {MAX_WEIGHT:g}")
    return value


def moment(source: Source, at: int, written: str) -> When:
    """As A1111 reads it: a number with a point, or below 1, is a share of the steps, any other a step."""
    value = float(written)
    share = "." in written or value < 1.0
    if value < 0.0:
        raise source.refuse(at, f"{written[:20]} lies before the first step")
    if value > (1.0 if share else _LAST_STEP):
        raise source.refuse(at, f"{written[:20]} lies past the last step; a share of the steps is at most 1.0")
    return When(value, share=True) if share else When(float(int(value)))


def rises(begin: When, end: When) -> bool:
    """Whether `end` lies behind `begin`; True where only the number of steps can tell."""
    return begin.share != end.share or begin.value < end.value


def follows(end: When, begin: When) -> bool:
    """Whether what begins at `begin` leaves alone what ends at `end`, as far as the two can tell."""
    return end == begin or rises(end, begin)
