"""A text -> one encoder's rows of token ids, a weight per token, and what was cut.

CLIP reads every span by itself, as A1111 does, so that a weight has whole tokens to lie on. T5 reads the whole text at
once and a token takes the weight of the character it begins with, so that no weight ever changes T5's tokens.

A BREAK begins a new row of a CLIP. To a T5 it is a space, and the first place at which a text that is too long for a
row is parted. A concept's vectors stand between what is read before and behind it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby

from serve.domain.text import FIRST_CONCEPT_ID
from serve.prompts.ast import Break
from serve.prompts.chunks import Tokenized
from serve.prompts.concepts import ConceptRef
from serve.prompts.flats import Flat, Span
from serve.prompts.tokenizers import PromptTokenizer, Tokens
from serve.prompts.wanted import NO_WORDS, runs


@dataclass(frozen=True, slots=True)
class TextRow:
    """`token_ids` is the whole row. `weights` has one factor per id of it, 1 for begin, end and padding; None where
    all are 1. `fragments` numbers the words of one weight, as in `WeightedRow`. `concepts` are the digests that ids
    from FIRST_CONCEPT_ID on belong to. `tokens` are those of the text that the row has; they begin at position `at`."""

    token_ids: tuple[int, ...]
    weights: tuple[float, ...] | None
    fragments: tuple[int, ...]
    concepts: tuple[str, ...]
    tokens: range
    at: int


@dataclass(frozen=True, slots=True)
class Reading:
    """A text as one encoder reads it. `weights` has a factor for each token, None where all are 1. `concepts` has, for
    each token that is a concept's vector, its digest and the vector's number."""

    tokens: Tokenized
    weights: tuple[float, ...] | None = None
    concepts: Mapping[int, tuple[str, int]] = field(default_factory=dict)
    vectors: Mapping[str, int] = field(default_factory=dict)
    """How many vectors each digest has."""


def read(
    tokenizer: PromptTokenizer,
    flat: Flat,
    concepts: Mapping[str, ConceptRef | None] | None = None,
    *,
    parted: bool | None = None,
) -> Reading:
    """`concepts` has those that `flat` names, None for one that this encoder has no vectors for and reads nothing of.
    `parted` says whether a row begins at every BREAK, by default for a CLIP alone."""
    return _Reader(tokenizer, concepts or {}).read(flat, tokenizer.kind == "clip" if parted is None else parted)


def lay_out(
    tokenizer: PromptTokenizer, reading: Reading, parts: Sequence[range], length: int, *, padded: bool = True
) -> tuple[TextRow, ...]:
    """The row of each of `parts`, which are tokens of the reading. `length` is the row's, special tokens included.
    Without padding it is the most that the row can have, and the row ends with its text.
    """
    numbers = () if reading.weights is None else runs(reading.weights)
    return tuple(_row(tokenizer, reading, part, numbers, length, padded) for part in parts)


def lowered(flat: Flat) -> Flat:
    """The same weights on `text.lower().strip()`, where text is that of all spans in a row. Concepts keep their names.

    The whole is lowered, because a letter may depend on its neighbours (the Greek sigma) or become two.
    """
    groups = [(words, list(group)) for words, group in groupby(flat, _is_text)]
    low: list[Span | Break] = []
    for number, (words, group) in enumerate(groups):
        spans = [each for each in group if isinstance(each, Span)]
        low += _lowered(spans, first=not number, last=number == len(groups) - 1) if words else group
    return tuple(low)


def _is_text(each: Span | Break) -> bool:
    return isinstance(each, Span) and each.concept is None


def _lowered(spans: Sequence[Span], *, first: bool, last: bool) -> Iterator[Span]:
    text = "".join(span.text for span in spans)
    low = text.lower()
    begin_at = len(low) - len(low.lstrip()) if first else 0
    end_at = len(low.rstrip()) if last else len(low)
    ends = [len(text[:end].lower()) for end in accumulate(len(span.text) for span in spans)]
    for span, begin, end in zip(spans, (0, *ends), ends, strict=False):
        part = low[max(begin, begin_at) : min(end, end_at)]
        if part:
            yield Span(part, span.weight)


class _Reader:
    """Fills while a text is read from its beginning to its end."""

    def __init__(self, tokenizer: PromptTokenizer, concepts: Mapping[str, ConceptRef | None]) -> None:
        self._tokenizer = tokenizer
        self._refs = concepts
        self._text = ""
        self._ids: list[int] = []
        self._starts: list[int] = []
        self._weights: list[float] = []
        self._glued: list[int] = []
        self._concepts: dict[int, tuple[str, int]] = {}
        self._vectors: dict[str, int] = {}

    def read(self, flat: Flat, parted: bool) -> Reading:
        breaks: list[int] = []
        """Tokens; characters where it is read across them."""
        spans: list[Span] = []
        length = 0
        for each in flat:
            span = Span(" ", 1.0) if isinstance(each, Break) else each
            if isinstance(each, Break):
                if parted:
                    self._words(spans)
                breaks.append(len(self._ids) if parted else length)
            length += len(span.text)
            if span.concept is None:
                spans.append(span)
            else:
                self._words(spans)
                self._concept(span.concept, span)
        self._words(spans)
        tokens = Tokenized(
            text=self._text,
            ids=tuple(self._ids),
            starts=tuple(self._starts),
            glued=frozenset(self._glued),
            breaks=tuple(breaks if parted else map(self._token_from, breaks)),
            parted=parted,
        )
        weights = None if all(weight == 1.0 for weight in self._weights) else tuple(self._weights)
        return Reading(tokens, weights, self._concepts, self._vectors)

    def _words(self, spans: list[Span]) -> None:
        """Read the spans, and forget them."""
        text = "".join(span.text for span in spans)
        if not text:
            return
        weights: Sequence[float]
        if all(span.weight == 1.0 for span in spans):
            tokens = self._tokenizer.tokenize(text)
            weights = (1.0,) * len(tokens.ids)
        elif self._tokenizer.kind == "clip":
            tokens, weights = _span_by_span(self._tokenizer, spans)
        else:
            tokens = self._tokenizer.tokenize(text)
            weights = _by_character(tokens, text, spans)
        self._ids += tokens.ids
        self._starts += (len(self._text) + start for start in tokens.starts)
        self._weights += weights
        self._text += text
        spans.clear()

    def _concept(self, name: str, span: Span) -> None:
        ref = self._refs[name]
        if ref is not None:
            self._vectors[ref.digest] = ref.vectors
            for number in range(ref.vectors):
                at = len(self._ids)
                self._concepts[at] = ref.digest, number
                if number:
                    self._glued.append(at)
                self._ids.append(FIRST_CONCEPT_ID + number)
                self._starts.append(len(self._text))
                self._weights.append(span.weight)
        self._text += span.text

    def _token_from(self, character: int) -> int:
        """The first token behind a character that is a space: it may begin with spaces before that one."""
        token = bisect_left(self._starts, character)
        while token and self._text[self._starts[token - 1] : character].isspace():
            token -= 1
        return token


def _span_by_span(tokenizer: PromptTokenizer, spans: Sequence[Span]) -> tuple[Tokens, list[float]]:
    ids: list[int] = []
    starts: list[int] = []
    factors: list[float] = []
    offset = 0
    for span in spans:
        tokens = tokenizer.tokenize(span.text)
        ids += tokens.ids
        starts += (offset + start for start in tokens.starts)
        factors += [span.weight] * len(tokens.ids)
        offset += len(span.text)
    return Tokens(tuple(ids), tuple(starts)), factors


def _by_character(tokens: Tokens, text: str, spans: Sequence[Span]) -> list[float]:
    """A token that begins with the space before its word takes the weight of the word."""
    firsts = [0, *accumulate(len(span.text) for span in spans)]
    ends = (*tokens.starts[1:], len(text))
    factors = []
    for start, end in zip(tokens.starts, ends, strict=True):
        first = next((at for at in range(start, end) if not text[at].isspace()), start)
        factors.append(spans[min(bisect_right(firsts, first), len(spans)) - 1].weight)
    return factors


def _row(
    tokenizer: PromptTokenizer, reading: Reading, part: range, numbers: Sequence[int], length: int, padded: bool
) -> TextRow:
    if not padded:
        length -= tokenizer.room(length) - len(part)
    ids, concepts = _numbered(reading, part)
    before = len(tokenizer.before)
    behind = length - before - len(part)
    weights: tuple[float, ...] | None = None
    fragments: tuple[int, ...] = ()
    factors = () if reading.weights is None else reading.weights[part.start : part.stop]
    if any(factor != 1.0 for factor in factors):
        weights = (*(1.0,) * before, *factors, *(1.0,) * behind)
        inside = numbers[part.start : part.stop]
        fragments = (*(NO_WORDS,) * before, *inside, *(NO_WORDS,) * behind)
    return TextRow(tokenizer.row(ids, length), weights, fragments, concepts, part, before)


def _numbered(reading: Reading, part: range) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The ids of a row, and the digests of its concepts: each has the ids behind those of the concepts before it."""
    ids = reading.tokens.ids[part.start : part.stop]
    if not reading.concepts:
        return ids, ()
    first: dict[str, int] = {}
    free = FIRST_CONCEPT_ID
    numbered = list(ids)
    for at in part:
        if at in reading.concepts:
            digest, number = reading.concepts[at]
            if digest not in first:
                first[digest] = free
                free += reading.vectors[digest]
            numbered[at - part.start] = first[digest] + number
    return tuple(numbered), tuple(first)
