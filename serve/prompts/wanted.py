"""Which units a weighting rule needs beside a text's own, told before anything is encoded.

A1111's rule and plain multiplication need none. Compel's draws words towards the empty text, and away from a row in
which nothing looks at them: the empty text's unit, and for each fragment that is weighted a unit of every row that has
words of it, with those `hidden`. They are asked for whatever the weight is, also where it needs but one of them, so
that another weight on the same words asks for nothing new.

`serve.encoders.weighting` does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import TypeAlias

from serve.domain.text import EncodeUnit, Weighting
from serve.errors import InvalidRequest

NO_WORDS = -1
"""In a row's `fragments`: begin, end and padding."""
MAX_FRAGMENTS = 32
"""Weighted fragments of one text under Compel's rule: each costs a row of the encoder."""

_Name: TypeAlias = tuple[int | None, int]
"""Of a fragment: its number, and the row that it was counted in, None where it was counted through all of them."""


@dataclass(frozen=True, slots=True)
class WeightedRow:
    """One row of a text, as it is encoded.

    `weights` has a factor for each token of it, 1 for begin, end and padding; None where all are 1. `fragments` has the
    number of the words that each token belongs to (`runs`), NO_WORDS for begin, end and padding; equal numbers in
    several rows are one fragment, which goes on there. Left empty, every run of equal weights in the row is a fragment
    of its own.
    """

    unit: EncodeUnit
    weights: tuple[float, ...] | None = None
    fragments: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Fragment:
    """Words that have one weight, which is not 1. `without` has a unit for each row of the text, in which nothing looks
    at these words; None for a row that has none of them."""

    weight: float
    without: tuple[EncodeUnit | None, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A text of one encoder and how it is weighted: all that `serve.encoders.weighting.apply` reads.

    `empty` is None where nothing is drawn towards the empty text. Its row is as long as each of `rows`, or longer.
    """

    rule: Weighting
    rows: tuple[WeightedRow, ...]
    empty: EncodeUnit | None = None
    fragments: tuple[Fragment, ...] = ()

    @property
    def extra(self) -> tuple[EncodeUnit, ...]:
        """The units that the rule needs beside the rows', once: the empty text's first."""
        hidden = (unit for fragment in self.fragments for unit in fragment.without if unit is not None)
        first = () if self.empty is None else (self.empty,)
        return tuple(dict.fromkeys(chain(first, hidden)))

    @property
    def units(self) -> tuple[EncodeUnit, ...]:
        """Every unit that is needed, once: the rows' first."""
        return tuple(dict.fromkeys((*(row.unit for row in self.rows), *self.extra)))


def runs(weights: Sequence[float]) -> tuple[int, ...]:
    """The fragment of each token of a whole text, from the tokens' weights: neighbours of one weight are one fragment,
    as Compel fuses them. For `WeightedRow.fragments`, before the text is parted into rows."""
    steps = (int(before != after) for before, after in pairwise(weights))
    return tuple(accumulate(steps, initial=0)) if weights else ()


def wanted(rule: Weighting, rows: Sequence[WeightedRow], empty: EncodeUnit, field: str = "prompt") -> Wanted:
    """What `rule` needs for the text of `field`, which fills `rows`.

    `empty` is the unit of the empty text: the same encoder and output, and a row as long as the longest of `rows` or
    longer. A family whose rows end with their text (`families.UNPADDED`) has it padded to the longest row that it may
    ask for, so that one serves every length; its first tokens stand against the row's.

    Raises InvalidRequest that names `field` where Compel's rule is asked for more than MAX_FRAGMENTS fragments, and
    ValueError where rows, weights and fragments don't fit each other.
    """
    for row in rows:
        _check(row, empty)
    if rule is not Weighting.COMPEL or not any(map(_weighted, rows)):
        return Wanted(rule, tuple(rows))
    weights: dict[_Name, float] = {}
    hidden: dict[_Name, dict[int, list[int]]] = {}
    for index, row in enumerate(rows):
        for position, name, weight in _words(index, row):
            if weights.setdefault(name, weight) != weight:
                raise ValueError(f"the words at position {position} of row {index} have several weights")
            hidden.setdefault(name, {}).setdefault(index, []).append(position)
    if len(weights) > MAX_FRAGMENTS:
        raise InvalidRequest(
            f"{field}: {len(weights)} groups of words have weights; Compel's weighting takes up to {MAX_FRAGMENTS}, "
            "A1111's any number",
            field,
        )
    fragments = (Fragment(weight, _without(rows, hidden[name])) for name, weight in weights.items())
    return Wanted(rule, tuple(rows), empty, tuple(fragments))


def _check(row: WeightedRow, empty: EncodeUnit) -> None:
    length = len(row.unit.token_ids)
    if row.weights is not None and len(row.weights) != length:
        raise ValueError(f"{len(row.weights)} weights for a row of {length} tokens")
    if row.fragments and len(row.fragments) != length:
        raise ValueError(f"{len(row.fragments)} numbers of fragments for a row of {length} tokens")
    if len(empty.token_ids) < length:
        raise ValueError(f"an empty text of {len(empty.token_ids)} tokens against a row of {length}")


def _weighted(row: WeightedRow) -> bool:
    return row.weights is not None and any(weight != 1.0 for weight in row.weights)


def _words(index: int, row: WeightedRow) -> Iterator[tuple[int, _Name, float]]:
    """(position, fragment, weight) of the weighted tokens of row `index`."""
    if row.weights is None:
        return
    names: Iterable[_Name] = ((None, number) for number in row.fragments)
    if not row.fragments:
        names = ((index, number) for number in runs(row.weights))
    for position, (name, weight) in enumerate(zip(names, row.weights, strict=True)):
        if weight != 1.0:
            if name[1] == NO_WORDS:
                raise ValueError(f"position {position} of row {index} has a weight and no words")
            yield position, name, weight


def _without(rows: Sequence[WeightedRow], places: Mapping[int, Sequence[int]]) -> tuple[EncodeUnit | None, ...]:
    return tuple(
        replace(row.unit, hidden=tuple(places[index])) if index in places else None for index, row in enumerate(rows)
    )
