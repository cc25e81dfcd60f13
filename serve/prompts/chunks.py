"""A text that is longer than an encoder's row, parted into rows: what `LongPrompt` means.

    chunk         as many rows as it takes. A row ends behind the last phrase (`,` `;`, or `.` `:` `!` `?` and a space)
                  that ends among its last 20 tokens, as A1111's behind a comma (`comma_padding_backtrack`), else
                  between two words
    window        rows that overlap by a third: each row begins with the last third of the one before, and the tokens
                  that two rows have take the mean of their two embeddings, in both. So every word is read with some of
                  what stands before it, and the rows stay rows
    head          the first tokens, as many as fit
    tail          the last ones
    hierarchical  the rows of `chunk`, and in their place their mean by number of tokens: one row, however long the text
    error         refused

Whatever is not read is told. A concept is never split over two rows, where a row can hold it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from serve.domain.text import LongPrompt
from serve.errors import InvalidRequest

BACKTRACK = 20
"""Tokens at the end of a row among which a phrase end is looked for."""
MAX_ROWS = 64
"""Rows of one text: 4,800 tokens of CLIP's."""
_ENDS = frozenset(",;、。，；")
_ENDS_BEFORE_SPACE = frozenset(".:!?")
_IN_WORDS = frozenset("'’-_")


@dataclass(frozen=True, slots=True)
class Tokenized:
    """One encoder's tokens of `text`, which has no syntax left in it. Token i begins at character `starts[i]`.

    `glued` are tokens that go on with the concept that the token before belongs to. `breaks` are those that a BREAK
    stands before, in rising order; where `parted`, a row must begin at each of them.
    """

    text: str
    ids: tuple[int, ...]
    starts: tuple[int, ...]
    glued: frozenset[int] = frozenset()
    breaks: tuple[int, ...] = ()
    parted: bool = False

    def told(self, first: int, end: int) -> str:
        """The text of tokens `first` to `end`, exclusive."""
        last = self.starts[end] if end < len(self.starts) else len(self.text)
        return self.text[self.starts[first] : last].strip() if first < end else ""

    def begins(self, token: int) -> int:
        """The character that the token begins with, past the space before a word."""
        at, last = self.starts[token], len(self.text) - 1
        while at < last and self.text[at].isspace():
            at += 1
        return at


def part(tokens: Tokenized, room: int, policy: LongPrompt, field: str, encoder: str) -> tuple[range, ...]:
    """The tokens of each row, at least one row. `room` is what a row has for them; `field` and `encoder` are for the
    refusals. Raises InvalidRequest for more than MAX_ROWS rows, and with `error` for what does not fit into one.
    """
    rows: list[range] = []
    for piece in _pieces(tokens):
        if len(piece) <= room:
            rows.append(piece)
        elif policy is LongPrompt.ERROR:
            raise InvalidRequest(
                f"{field}: {len(piece)} tokens are more than the {room} that {encoder} reads (long_prompt is error)",
                field,
            )
        elif policy is LongPrompt.HEAD or room < 1:
            rows.append(_kept(tokens, piece, room, tail=False))
        elif policy is LongPrompt.TAIL:
            rows.append(_kept(tokens, piece, room, tail=True))
        else:
            rows += _chunks(tokens, piece, room, room // 3 if policy is LongPrompt.WINDOW else 0)
    if len(rows) > MAX_ROWS:
        raise InvalidRequest(
            f"{field}: {len(tokens.ids)} tokens are {len(rows)} rows of {encoder}, and at most {MAX_ROWS} are read; "
            "long_prompt can keep the head or the tail",
            field,
        )
    return tuple(rows) or (range(0),)


def cut(tokens: Tokenized, rows: Sequence[range]) -> tuple[int, str]:
    """How many tokens are in none of the rows, and their text."""
    gone: list[str] = []
    number = end = 0
    for first, last in (*((row.start, row.stop) for row in rows), (len(tokens.ids),) * 2):
        if first > end:
            number += first - end
            gone.append(tokens.told(end, first))
        end = max(end, last)
    return number, " ".join(filter(None, gone))


def _pieces(tokens: Tokenized) -> list[range]:
    """The whole, or what stands between two BREAKs; what has no tokens is none."""
    cuts = (0, *(tokens.breaks if tokens.parted else ()), len(tokens.ids))
    return [range(first, end) for first, end in pairwise(cuts) if first < end]


def _kept(tokens: Tokenized, piece: range, room: int, *, tail: bool) -> range:
    if tail:
        first = piece.stop - room
        while first in tokens.glued:
            first += 1
        return range(first, piece.stop)
    end = piece.start + room
    while end in tokens.glued:
        end -= 1
    return range(piece.start, end)


def _chunks(tokens: Tokenized, piece: range, room: int, overlap: int) -> list[range]:
    rows: list[range] = []
    first = end = piece.start
    while end < piece.stop:
        if rows and _end(tokens, first, piece.stop, room, bool(overlap)) <= end:
            first = end  # a concept behind the overlap leaves no room for anything new
        end = _end(tokens, first, piece.stop, room, bool(overlap))
        rows.append(range(first, end))
        first = max(first, end - overlap)
        while first in tokens.glued and first < end:
            first += 1
    return rows


def _end(tokens: Tokenized, first: int, stop: int, room: int, windowed: bool) -> int:
    """Where the row that begins with token `first` ends: after the last BREAK in it, else phrase, else word. Windows
    end where the row does, but for a concept."""
    limit = first + room
    if limit >= stop:
        return stop
    candidates = range(limit, first, -1)
    if not windowed:
        for found in (
            next((at for at in reversed(tokens.breaks) if first < at <= limit), None),
            next((at for at in candidates[:BACKTRACK] if _phrase_ends(tokens, at)), None),
            next((at for at in candidates if _word_begins(tokens, at)), None),
        ):
            if found is not None:
                return found
    return next((at for at in candidates if at not in tokens.glued), limit)


def _phrase_ends(tokens: Tokenized, at: int) -> bool:
    """Whether a phrase ends before token `at`, which is not the text's first one."""
    if not _word_begins(tokens, at):
        return False
    begin = tokens.begins(at)
    last = tokens.text[:begin].rstrip()[-1:] if begin else ""
    return last in _ENDS or (last in _ENDS_BEFORE_SPACE and tokens.text[begin - 1].isspace())


def _word_begins(tokens: Tokenized, at: int) -> bool:
    """Whether a row may begin with token `at`: neither a word nor a concept goes on there."""
    if at in tokens.glued or tokens.starts[at] == tokens.starts[at - 1]:
        return False
    begin = tokens.begins(at)
    return not (_in_word(tokens.text[begin - 1]) and _in_word(tokens.text[begin]))


def _in_word(character: str) -> bool:
    return character.isalnum() or character in _IN_WORDS or unicodedata.category(character).startswith("M")
