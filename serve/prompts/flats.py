"""Words that change with the steps -> the texts that stand there in one step, and their shares.

What changes does so by a few rules, which many brackets may share: a switch at step 5, a ramp from 10 to 20, a turn of
three. Where those rules stand decides which text a step reads, so that no text is put together twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TypeAlias

from serve.errors import InvalidRequest
from serve.prompts.ast import Alternate, Break, Concept, Ramp, Switch, Text, Weighted, When, Words
from serve.prompts.building import power
from serve.prompts.places import MAX_WEIGHT

MAX_TEXTS = 64
"""Distinct texts of one prompt: each is an embedding that its images hold."""


@dataclass(frozen=True, slots=True)
class Span:
    """A run of text without any syntax left in it, and the factor on the embeddings of its tokens. With `concept`, the
    learned vectors of that name stand there, and `text` is how it is written."""

    text: str
    weight: float
    concept: str | None = None


Flat: TypeAlias = tuple[Span | Break, ...]
"""One text. Neighbouring spans differ in weight, unless one is a concept. A BREAK has something on both sides."""

Shares: TypeAlias = dict[Flat, float]
"""Texts and how much of each there is."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What a prompt is read for: so many steps, and the request's field that it is in."""

    steps: int
    field: str

    def step(self, when: When, shown: Callable[[], str]) -> int:
        """The step of a moment; the number of steps is one that never comes. `shown` says where it is written."""
        if not 0 <= when.value <= (1 if when.share else self.steps):  # also refuses NaN
            past = f"{when.value:g} in {shown()} is past the last step, {self.steps}"
            raise InvalidRequest(f"{self.field}: {past}", self.field)
        return when.step(self.steps)

    def too_many(self) -> InvalidRequest:
        return InvalidRequest(f"{self.field}: its steps make more than {MAX_TEXTS} texts of it", self.field)


@dataclass(frozen=True, slots=True)
class Slope:
    """0 up to step `begin`, 1 from step `end` on, and in equal parts in between; a switch where they are one step."""

    begin: int
    end: int

    def at(self, step: int) -> float:
        if step >= self.end:
            return 1.0
        return 0.0 if step <= self.begin else (step - self.begin) / (self.end - self.begin)

    def moments(self, steps: int) -> range:
        first = self.end if self.begin == self.end else self.begin + 1
        return range(first, min(self.end + 1, steps))


@dataclass(frozen=True, slots=True)
class _Turn:
    """Another one of `number` in each step."""

    number: int

    def at(self, step: int) -> float:
        return step % self.number

    def moments(self, steps: int) -> range:
        return range(steps if self.number > 1 else 0)


_Selector: TypeAlias = Slope | _Turn
"""Where it stands in a step: for a slope 0, 1 or the share of what will be; for a turn whose it is."""


class Track:
    """Words, step by step. `moments` are the steps behind the first at which another text may stand there.

    Raises InvalidRequest for a moment past the last step.
    """

    def __init__(self, words: Words, frame: Frame) -> None:
        self._words = words
        self._frame = frame
        self._selectors: dict[_Selector, int] = {}
        """Each has a place in what is chosen."""
        self._places: dict[int, int] = {}
        """The same, by the identity of the change that it decides."""
        self._collect(words)
        self._flats: dict[tuple[int, ...], Flat] = {}
        self.moments = frozenset(step for each in self._selectors for step in each.moments(frame.steps))
        # Found out before any of them is put together: a switch in every step of a long text is a lot of text.
        if len({tuple(int(each.at(step)) for each in self._selectors) for step in self.moments}) > MAX_TEXTS:
            raise frame.too_many()

    def at(self, step: int) -> Shares:
        """Each slope that is under way doubles the texts: what was, and what will be."""
        states = [selector.at(step) for selector in self._selectors]
        sides = [((1 - state, 0), (state, 1)) if 0 < state < 1 else ((1.0, int(state)),) for state in states]
        if sum(len(side) > 1 for side in sides) > MAX_TEXTS.bit_length() - 1:
            raise self._frame.too_many()
        shares: Shares = {}
        for chosen in product(*sides):
            flat = self._flat(tuple(side for _, side in chosen))
            shares[flat] = shares.get(flat, 0.0) + prod(share for share, _ in chosen)
        return shares

    def _flat(self, choice: tuple[int, ...]) -> Flat:
        if choice not in self._flats:
            if len(self._flats) == MAX_TEXTS:
                raise self._frame.too_many()
            writer = _Writer({change: choice[place] for change, place in self._places.items()}, self._frame)
            writer.write(self._words)
            self._flats[choice] = writer.flat()
        return self._flats[choice]

    def _collect(self, words: Words) -> None:
        for word in words:
            if isinstance(word, Alternate | Switch | Ramp):
                selector = _selector(word, self._frame)
                self._places[id(word)] = self._selectors.setdefault(selector, len(self._selectors))
            for inner in _inside(word):
                self._collect(inner)


def _selector(word: Alternate | Switch | Ramp, frame: Frame) -> _Selector:
    if isinstance(word, Alternate):
        return _Turn(len(word.options))
    begin, end = (word.when, word.when) if isinstance(word, Switch) else (word.begin, word.end)

    def shown() -> str:
        until = "" if isinstance(word, Switch) else f"-{end.value:g}"
        return f"[{_shown(word.before)}:{_shown(word.after)}:{begin.value:g}{until}]"

    slope = Slope(frame.step(begin, shown), frame.step(end, shown))
    if slope.end < slope.begin:
        raise InvalidRequest(f"{frame.field}: {shown()} ends before it begins", frame.field)
    return slope


def _inside(word: object) -> tuple[Words, ...]:
    match word:
        case Weighted(words):
            return (words,)
        case Switch(before, after) | Ramp(before, after):
            return (before, after)
        case Alternate(options):
            return options
    return ()


def _shown(words: Words) -> str:
    """The beginning of the words, for a message."""
    for word in words:
        if isinstance(word, Text | Concept):
            text = word.text.strip() if isinstance(word, Text) else f"<{word.name}>"
            if text:
                return text if len(text) <= 20 else f"{text[:20]}..."
        else:
            text = next(filter(None, map(_shown, _inside(word))), "")
            if text:
                return text
    return ""


class _Writer:
    """Puts one text together. Powers are counted, not multiplied out, so that ([x]) weighs exactly 1."""

    def __init__(self, choices: Mapping[int, int], frame: Frame) -> None:
        """`choices` has the side of each change that is read, by the change's identity."""
        self._choices = choices
        self._frame = frame
        self._spans: list[Span | Break] = []
        self._open: list[str] = []
        """What the last span is made of; it is joined when the next one begins."""
        self._weight = 1.0

    def flat(self) -> Flat:
        self._close()
        if self._spans and isinstance(self._spans[-1], Break):
            self._spans.pop()
        return tuple(self._spans)

    def write(self, words: Words, factor: float = 1.0, steps: int = 0) -> None:
        weight = power(factor, steps)
        for word in words:
            match word:
                case Text(text):
                    self._text(text, self._checked(weight, words))
                case Concept(name):
                    self._close()
                    self._spans.append(Span(f"<{name}>", self._checked(weight, words), name))
                case Weighted(inner, by, more):
                    self.write(inner, factor * by, steps + more)
                case Break():
                    self._close()
                    if self._spans and not isinstance(self._spans[-1], Break):
                        self._spans.append(word)
                case Switch() | Ramp() | Alternate():
                    self.write(_inside(word)[self._choices[id(word)]], factor, steps)

    def _text(self, text: str, weight: float) -> None:
        if text and weight != self._weight:
            self._close()
            self._weight = weight
        self._open.append(text)

    def _close(self) -> None:
        text = "".join(self._open)
        self._open.clear()
        if text:
            self._spans.append(Span(text, self._weight))

    def _checked(self, weight: float, words: Words) -> float:
        if not abs(weight) <= MAX_WEIGHT:
            field = self._frame.field
            raise InvalidRequest(f"{field}: the weight of {_shown(words)!r} is beyond {MAX_WEIGHT:g}", field)
        return weight
