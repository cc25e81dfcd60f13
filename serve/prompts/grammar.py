r"""A1111's prompt syntax -> weighted spans of text.

    (x)  1.1 times        [x]  1/1.1 times        (x:1.5)  1.5 times        \( \) \[ \] \\  the character itself

Nested brackets multiply. A bracket that is never closed closes at the end; a closing bracket that closes nothing is
text. Round and square brackets are matched apart, as there, so they may overlap. The behaviour is the one that
https://github.com/AUTOMATIC1111/stable-diffusion-webui documents in its `parse_prompt_attention`.

What those users also write and Tandem does not do yet is refused by name, because read as plain text it would be drawn
as something else: `[from:to:when]`, `[a|b]`, `AND`, `BREAK`, `<lora:name:1>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from serve.errors import InvalidRequest

EMPHASIS = 1.1
"""Factor of one pair of round brackets; a pair of square ones divides by it."""
MAX_WEIGHT = 1000.0
"""Largest weight, either sign: far beyond any use, far below what overflows in half precision arithmetic."""

_LEX = re.compile(
    r"""
      \\(?P<escaped>[()\[\]\\|])
    | (?P<backslash>\\)
    | (?P<weight>:\s*(?P<number>[+-]?[.0-9]+)\s*\))
    | (?P<when>:\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)\s*\])
    | (?P<bracket>[()\[\]])
    | (?P<text>[^\\()\[\]:|]+|[:|])
    """,
    re.VERBOSE,
)
_KEYWORD = re.compile(r"\b(AND|BREAK)\b")
_NETWORK = re.compile(r"<(\w+):(?=[^>])")


@dataclass(frozen=True, slots=True)
class Span:
    """A run of text without any syntax left in it, and the factor on the embeddings of its tokens."""

    text: str
    weight: float


@dataclass(slots=True)
class _Piece:
    """Text, or a bracket. An opening bracket learns what it does (`steps`, `factor`) when its end is found."""

    text: str = ""
    steps: int = 0
    """Power of EMPHASIS: 1 for (x), -1 for [x], 0 for (x:w)."""
    factor: float = 1.0
    opened_by: int | None = None
    """Of a closing bracket, the index of the opening one."""


def parse(text: str, field: str = "prompt") -> tuple[Span, ...]:
    """Spans in order; neighbours differ in weight; empty text gives none. Time grows linearly with the text.

    Raises InvalidRequest that names `field` for a construct that is not supported and for a weight out of range.
    """
    _refuse_words(text, field)
    weighed = _weigh(_match_brackets(text, field), field)
    runs = groupby(weighed, key=lambda pair: pair[1])
    return tuple(Span("".join(part for part, _ in run), weight) for weight, run in runs)


def _match_brackets(text: str, field: str) -> list[_Piece]:
    pieces: list[_Piece] = []
    rounds: list[int] = []
    squares: list[int] = []
    barred: set[int] = set()
    """Square brackets with a bar directly inside them."""
    for match in _LEX.finditer(text):
        kind, token = match.lastgroup, match.group()
        if kind == "backslash":
            continue
        piece = _Piece()
        if kind == "escaped":
            piece.text = token[1:]
        elif kind == "when" and squares:
            raise _unsupported("[from:to:when]", "a prompt that changes between steps", field)
        elif kind == "bracket" and token in "([":
            (rounds if token == "(" else squares).append(len(pieces))
        elif token.endswith(")") and rounds and kind in ("weight", "bracket"):
            piece.opened_by = rounds.pop()
            if kind == "weight":
                pieces[piece.opened_by].factor = _number(match["number"], field)
            else:
                pieces[piece.opened_by].steps = 1
        elif token == "]" and squares:
            piece.opened_by = squares.pop()
            pieces[piece.opened_by].steps = -1
            if piece.opened_by in barred:
                raise _unsupported("[a|b]", "a prompt that alternates between steps", field)
        else:
            piece.text = token
            if token == "|" and squares and squares[-1] > max(rounds[-1:], default=-1):
                barred.add(squares[-1])
        pieces.append(piece)
    for never_closed, steps in ((rounds, 1), (squares, -1)):
        for index in never_closed:
            pieces[index].steps = steps
    return pieces


def _weigh(pieces: list[_Piece], field: str) -> Iterator[tuple[str, float]]:
    """(text, weight) of every piece of text. Powers are counted, not multiplied out, so that ([x]) weighs exactly 1."""
    steps = 0
    factors = [1.0]
    """Products of the round brackets' weights around here, outermost first."""
    for piece in pieces:
        if piece.text:
            yield piece.text, _weight(factors[-1], steps, field)
        elif piece.opened_by is None:
            steps += piece.steps
            if piece.steps != -1:
                factors.append(factors[-1] * piece.factor)
        else:
            opening = pieces[piece.opened_by]
            steps -= opening.steps
            if opening.steps != -1:
                factors.pop()


def _weight(factor: float, steps: int, field: str) -> float:
    # 1.1 ** 1000 is finite, and beyond it any factor that a client can write is out of range anyway.
    weight = factor * EMPHASIS ** max(-1000, min(1000, steps))
    if not abs(weight) <= MAX_WEIGHT:
        raise InvalidRequest(f"{field}: a weight is beyond {MAX_WEIGHT:g}", field)
    return weight


def _number(written: str, field: str) -> float:
    try:
        return float(written)
    except ValueError:
        raise InvalidRequest(f"{field}: the weight {written[:20]} is not a number", field) from None


def _refuse_words(text: str, field: str) -> None:
    word = _KEYWORD.search(text)
    if word is not None:
        meaning = "a composition of prompts" if word[1] == "AND" else "a prompt in chunks"
        raise _unsupported(word[1], meaning, field)
    last = text.rfind(">")
    for network in _NETWORK.finditer(text):
        if network.end() < last:
            raise _unsupported(f"<{network[1][:20]}:...>", "an extra network", field)


def _unsupported(construct: str, meaning: str, field: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {construct} ({meaning}) is not supported yet", field)
