"""Compel's words and brackets: what its parser, an ordered choice with backtracking, finds, in linear time.

What is in brackets or quotes has to be well formed as a whole: words, brackets, quotes, commas and points. Where it is
not, the outermost opening character begins a plain word instead, which ends at the next blank. So whatever is open when
something doesn't fit has failed for good, and is not tried again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from serve.prompts.brackets import MAX_NESTING
from serve.prompts.places import Source, weight

_MINUS = 0.9
# As in Compel, a blank that is not ASCII is a letter like others.
_BLANKS = re.compile(r"\s*", re.ASCII)
_SIGNS = r'()",.+=\-'
_WORD = re.compile(rf"(?:\\[{_SIGNS}]|[-+](?![\s{_SIGNS}]|\Z)|-?[0-9]+|[^\s{_SIGNS}])+", re.ASCII)
_FREE = re.compile(r"\S+", re.ASCII)
_QUOTED = re.compile(r'"(?P<inside>(?:\\"|[^"\n\r])*)"')
_AMOUNT = r"(?:(?P<plus>\++)|(?P<minus>-+)|(?P<number>[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+))"
_BEHIND = re.compile(_AMOUNT)
_BEHIND_WORD = re.compile(r"(?P<plus>\++)|(?P<minus>-+)")
_ATTEND = re.compile(rf"\s*\.attend\s*\(\s*{_AMOUNT}\s*\)", re.ASCII)

Amount: TypeAlias = tuple[float, int]
"""The factor and the power of 1.1 that a weight is."""
Leaf: TypeAlias = tuple[str, float, int, int]
"""A fragment of text, its weight, and where it stands."""


@dataclass(slots=True)
class Group:
    """What is in brackets or quotes. `end` is where these end, and the weight behind them begins."""

    start: int
    end: int = 0
    nodes: list[Leaf | Group] = field(default_factory=list)
    amount: Amount = (1.0, 0)


def leaves(nodes: list[Leaf | Group]) -> Iterator[Leaf]:
    """In order, each with all the weights that lie on it."""
    open_groups: list[tuple[Iterator[Leaf | Group], float, int]] = [(iter(nodes), 1.0, 0)]
    while open_groups:
        inside, factor, steps = open_groups[-1]
        node = next(inside, None)
        if node is None:
            open_groups.pop()
        elif isinstance(node, Group):
            open_groups.append((iter(node.nodes), factor * node.amount[0], steps + node.amount[1]))
        else:
            yield node[0], factor * node[1], steps + node[2], node[3]


class CompelReader:
    """Owns: which brackets of the text are known to fail, by where they begin and where the text around them ends."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._text = source.text
        self._failed: set[tuple[int, int]] = set()

    def blanks(self, at: int) -> int:
        match = _BLANKS.match(self._text, at)
        return match.end() if match is not None else at

    def prompt(self) -> list[Leaf | Group]:
        return self._free(0, len(self._text))

    def target(self, at: int) -> tuple[list[Leaf | Group], int] | None:
        """A prompt of a call, and where it ends: in quotes or brackets that have no weight, or a single word."""
        if self._text.startswith("(", at):
            read = self._strict(at, len(self._text), single=True)
            if read is None or not isinstance(group := read[0][0], Group):
                return None
            return group.nodes, group.end
        if (quoted := _QUOTED.match(self._text, at)) is not None:
            inside = self._strict(*quoted.span("inside"))
            return (inside[0] if inside is not None else self._free(*quoted.span("inside"))), quoted.end()
        word = _WORD.match(self._text, at)
        return None if word is None else ([(word.group(), 1.0, 0, at)], word.end())

    def _free(self, at: int, end: int) -> list[Leaf | Group]:
        """Anything; what doesn't fit is a plain word."""
        nodes: list[Leaf | Group] = []
        while (at := min(self.blanks(at), end)) < end:
            read = self._weighed(at, end)
            if read is None:
                free = _FREE.match(self._text, at, end)
                assert free is not None  # it begins with no blank
                read = (free.group(), 1.0, 0, at), free.end()
            nodes.append(read[0])
            at = read[1]
        return nodes

    def _weighed(self, at: int, end: int) -> tuple[Leaf | Group, int] | None:
        """Brackets, quotes, or a word with a weight."""
        char = self._text[at]
        if char == "(":
            brackets = self._strict(at, end, single=True)
            return None if brackets is None else (brackets[0][0], brackets[1])
        if char == '"':
            return self._quoted(at, end)
        return self._word(at, end, bare=False)

    def _strict(self, at: int, end: int, *, single: bool = False) -> tuple[list[Leaf | Group], int] | None:
        """Well-formed text until `end`, or, where `single`, just the brackets that begin at `at`; else None."""
        text = self._text
        groups = [Group(at)]
        while True:
            at = min(self.blanks(at), end)
            char = text[at] if at < end else ""
            read: tuple[Leaf | Group, int] | None = None
            if char == "(":
                if (at, end) in self._failed:
                    break
                if len(groups) > MAX_NESTING:
                    raise self._source.refuse(at, f"more than {MAX_NESTING} brackets are open")
                groups.append(Group(at))
                at += 1
                continue
            if char == ")" and len(groups) > 1:
                group = groups.pop()
                group.end = at + 1
                group.amount, at = self._amount(group.end, end, _BEHIND)
                read = group, at
            elif char == '"':
                read = self._quoted(at, end)
            elif char and char in ",.":
                read = (char, 1.0, 0, at), at + 1
            elif char:
                read = self._word(at, end)
            elif len(groups) == 1:
                return groups[0].nodes, at
            if read is None:
                break
            groups[-1].nodes.append(read[0])
            at = read[1]
            if single and len(groups) == 1:
                return groups[0].nodes, at
        self._failed.update((group.start, end) for group in groups[1:])
        return None

    def _quoted(self, at: int, end: int) -> tuple[Group, int] | None:
        match = _QUOTED.match(self._text, at, end)
        if match is None:
            return None
        inside = self._strict(*match.span("inside"))
        if inside is None:
            return None
        amount, after = self._amount(match.end(), end, _BEHIND)
        return Group(at, match.end(), inside[0], amount), after

    def _word(self, at: int, end: int, *, bare: bool = True) -> tuple[Leaf, int] | None:
        """`bare`: without a weight too."""
        match = _WORD.match(self._text, at, end)
        if match is None:
            return None
        (factor, steps), after = self._amount(match.end(), end, _BEHIND_WORD)
        if after == match.end() and not bare:
            return None
        return (match.group(), factor, steps, at), after

    def _amount(self, at: int, end: int, behind: re.Pattern[str]) -> tuple[Amount, int]:
        """The weight that is written at `at`, and where it ends; (1.0, 0) where there is none."""
        match = _ATTEND.match(self._text, at, end) or behind.match(self._text, at, end)
        if match is None:
            return (1.0, 0), at
        if match["plus"]:
            return (1.0, len(match["plus"])), match.end()
        if match["minus"]:
            return (_MINUS ** len(match["minus"]), 0), match.end()
        return (weight(self._source, match.start("number"), match["number"]), 0), match.end()
