r"""A1111's syntax -> pieces in a row, of which every bracket knows what it does.

Two readings lie over each other, as in A1111. Round and square brackets that weigh are matched apart, so they may
overlap; one that is never closed closes at the end, and one that closes nothing is text. Square brackets that change
the words from step to step (`[a:b:10]`, `[a|b]`) have to be well nested, with everything inside of them.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field

from serve.prompts.ast import When
from serve.prompts.places import CONCEPT, MOMENT, NUMBER, Source, moment, rises, weight

MAX_NESTING = 100
"""Brackets that may be open at once."""

_LEX = re.compile(
    rf"""
      \\(?P<escaped>[()\[\]{{}}|:\\<])
    | (?P<dropped>\\)
    | (?P<weight>:\s*(?P<number>{NUMBER})\s*\))
    | (?P<bracket>[()\[\]])
    | (?P<divider>[:|])
    | <(?P<concept>{CONCEPT})>
    | (?P<network><)(?=\w+:)
    | (?P<text>[^\\()\[\]:|<]+|<)
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\bBREAK\b")
_MOMENTS = re.compile(rf"\s*(?P<first>{MOMENT})(?:\s*-\s*(?P<last>{MOMENT}))?\s*")


class Kind(enum.Enum):
    TEXT = enum.auto()
    """Characters as they are."""
    LITERAL = enum.auto()
    """A character that was escaped; nothing, where a backslash escapes none."""
    CONCEPT = enum.auto()
    BREAK = enum.auto()
    OPEN = enum.auto()
    """A bracket that weighs: `factor` and `steps` are those of `ast.Weighted`."""
    CLOSE = enum.auto()
    """Its end."""
    CHANGE = enum.auto()
    """A bracket that changes words: at `moments`, one of a switch and two of a ramp, or at every step."""
    NEXT = enum.auto()
    """Between the words of a change."""
    END = enum.auto()
    """The end of a change."""
    NOTHING = enum.auto()


@dataclass(slots=True)
class Piece:
    """`at` is where it begins. `opening` is the bracket that a CLOSE closes."""

    kind: Kind
    text: str
    at: int
    round: bool = False
    factor: float = 1.0
    steps: int = 0
    opening: Piece | None = None
    moments: tuple[When, ...] = ()


@dataclass(slots=True)
class _Nest:
    """A bracket that is well nested so far, and the colons and bars directly inside of it (indices of pieces)."""

    bracket: Piece
    colons: list[int] = field(default_factory=list)
    bars: list[int] = field(default_factory=list)


class Brackets:
    """Reads one text, in time that grows linearly with it. Owns: the pieces."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.pieces: list[Piece] = []
        self._rounds: list[Piece] = []
        self._squares: list[Piece] = []
        self._nests: list[_Nest] = []
        """The innermost last. Emptied by a bracket that breaks the nesting: it lies inside of all of them."""

    def read(self) -> list[Piece]:
        """Raises InvalidRequest."""
        text = self._source.text
        last = text.rfind(">")
        for match in _LEX.finditer(text):
            kind, token, at = match.lastgroup, match.group(), match.start()
            if kind == "text":
                self._text(token, at)
            elif kind == "escaped" or kind == "dropped":
                self._add(Kind.LITERAL, token[1:], at)
            elif kind == "concept":
                self._add(Kind.CONCEPT, match["concept"], at)
            elif kind == "bracket" and token in "([":
                self._open(token, at)
            elif token == "]":
                self._close_square(at)
            elif kind == "bracket" or kind == "weight":
                self._close_round(token, at, match.start("number"), match["number"])
            elif kind == "divider":
                self._divide(token, at)
            elif kind == "network":
                self._network(at, last)
        for bracket in (*self._rounds, *self._squares):
            bracket.steps = 1 if bracket.round else -1
        return self.pieces

    def _add(self, kind: Kind, text: str, at: int) -> Piece:
        piece = Piece(kind, text, at)
        self.pieces.append(piece)
        return piece

    def _text(self, text: str, at: int) -> None:
        if "BREAK" not in text:
            self._add(Kind.TEXT, text, at)
            return
        begin = 0
        for match in _BREAK.finditer(text):
            self._add(Kind.TEXT, text[begin : match.start()], at + begin)
            self._add(Kind.BREAK, "BREAK", at + match.start())
            begin = match.end()
        self._add(Kind.TEXT, text[begin:], at + begin)

    def _open(self, token: str, at: int) -> None:
        if len(self._rounds) + len(self._squares) >= MAX_NESTING:
            raise self._source.refuse(at, f"more than {MAX_NESTING} brackets are open")
        piece = self._add(Kind.OPEN, token, at)
        piece.round = token == "("
        (self._rounds if piece.round else self._squares).append(piece)
        self._nests.append(_Nest(piece))

    def _close_round(self, token: str, at: int, number_at: int, number: str | None) -> None:
        if not self._rounds:
            self._add(Kind.TEXT, token, at)
            self._nests.clear()
            return
        opening = self._rounds.pop()
        self._unnest(opening)
        if number is None:
            opening.steps = 1
        else:
            opening.factor = weight(self._source, number_at, number)
        self._add(Kind.CLOSE, token, at).opening = opening

    def _close_square(self, at: int) -> None:
        if not self._squares:
            self._add(Kind.TEXT, "]", at)
            self._nests.clear()
            return
        opening = self._squares.pop()
        nest = self._unnest(opening)
        if nest is not None and (self._switches(nest) or self._alternates(nest)):
            opening.kind = Kind.CHANGE
            self._add(Kind.END, "]", at)
            return
        opening.steps = -1
        self._add(Kind.CLOSE, "]", at).opening = opening

    def _unnest(self, opening: Piece) -> _Nest | None:
        """What is directly inside of the bracket that closes, None where it is not well nested."""
        if self._nests and self._nests[-1].bracket is opening:
            return self._nests.pop()
        self._nests.clear()
        return None

    def _divide(self, token: str, at: int) -> None:
        """Text, until a square bracket closes that makes more of it."""
        if self._nests:
            nest = self._nests[-1]
            (nest.colons if token == ":" else nest.bars).append(len(self.pieces))
        self._add(Kind.TEXT, token, at)

    def _switches(self, nest: _Nest) -> bool:
        """`[a:b:10]`, `[b:10]`, `[a:b:10-20]`: only a number between the last of at most two colons and the end."""
        colons = nest.colons
        if not 1 <= len(colons) <= 2 or colons[-1] != len(self.pieces) - 2:
            return False
        written = self.pieces[-1]
        match = _MOMENTS.fullmatch(written.text) if written.kind is Kind.TEXT else None
        if match is None:
            return False
        named = [name for name in ("first", "last") if match[name] is not None]
        moments = tuple(moment(self._source, written.at + match.start(name), match[name]) for name in named)
        if len(moments) == 2 and not rises(*moments):
            raise self._source.refuse(written.at + match.start("last"), "the ramp ends before it begins")
        nest.bracket.moments = moments
        for at in colons[:-1]:
            self.pieces[at].kind = Kind.NEXT
        self.pieces[-1].kind = self.pieces[-2].kind = Kind.NOTHING
        return True

    def _alternates(self, nest: _Nest) -> bool:
        for at in nest.bars:
            self.pieces[at].kind = Kind.NEXT
        return bool(nest.bars)

    def _network(self, at: int, last: int) -> None:
        """`<lora:name:1>`; without its end it is text. `last` is where the text's last `>` stands."""
        text = self._source.text
        end = text.index(":", at) + 1
        if end < last and text[end] != ">":
            name = f"<{text[at + 1 : end - 1][:20]}:...>"
            raise self._source.refuse(at, rf"{name}: extra networks are not supported yet; \< is the character itself")
        self._add(Kind.TEXT, "<", at)
