"""Weighted spans of text -> one encoder's row of token ids, a weight per token, and what was cut.

CLIP reads every span by itself, as A1111 does, so that a weight has whole tokens to lie on. T5 reads the whole text at
once and a token takes the weight of the character it begins with, so that no weight ever changes T5's tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from serve.prompts.grammar import Span
from serve.prompts.tokenizers import PromptTokenizer, Tokens


@dataclass(frozen=True, slots=True)
class TextRow:
    """`token_ids` is the whole row. `weights` has one factor per id of it, 1 for begin, end and padding; None where
    all are 1. `used` and `cut` count tokens of the text, `unknown` those of `used` that stand for text outside the
    vocabulary. `rest` is the text that was cut."""

    token_ids: tuple[int, ...]
    weights: tuple[float, ...] | None
    used: int
    cut: int
    unknown: int
    rest: str


def lay_out(tokenizer: PromptTokenizer, spans: Sequence[Span], length: int, *, padded: bool = True) -> TextRow:
    """`length` is the row's, special tokens included; text beyond it is cut. Without padding it is the most that the
    row can have, and the row ends with its text.
    """
    text = "".join(span.text for span in spans)
    factors: Sequence[float] | None = None
    if all(span.weight == 1.0 for span in spans):
        tokens = tokenizer.tokenize(text)
    elif tokenizer.kind == "clip":
        tokens, factors = _span_by_span(tokenizer, spans)
    else:
        tokens = tokenizer.tokenize(text)
        factors = _by_character(tokens, text, spans)
    room = tokenizer.room(length)
    used = tokens.ids[:room]
    if not padded:
        length -= room - len(used)
    return TextRow(
        token_ids=tokenizer.row(used, length),
        weights=_row_of_weights(factors[:room], tokenizer, length) if factors is not None else None,
        used=len(used),
        cut=len(tokens.ids) - len(used),
        unknown=used.count(tokenizer.unknown) if tokenizer.unknown is not None else 0,
        rest=text[tokens.starts[room] :].strip() if len(tokens.ids) > room else "",
    )


def lowered(spans: Sequence[Span]) -> tuple[Span, ...]:
    """The same weights on `text.lower().strip()`, where text is that of all spans in a row.

    The whole is lowered, because a letter may depend on its neighbours (the Greek sigma) or become two.
    """
    text = "".join(span.text for span in spans)
    low = text.lower()
    first, last = len(low) - len(low.lstrip()), len(low.rstrip())
    ends = [len(text[:end].lower()) for end in accumulate(len(span.text) for span in spans)]
    parts = [
        Span(low[max(begin, first) : min(end, last)], span.weight)
        for span, begin, end in zip(spans, (0, *ends), ends, strict=False)
    ]
    return tuple(part for part in parts if part.text)


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


def _row_of_weights(factors: Sequence[float], tokenizer: PromptTokenizer, length: int) -> tuple[float, ...] | None:
    """None where the weights lie on tokens that were cut."""
    if all(factor == 1.0 for factor in factors):
        return None
    begin = len(tokenizer.before)
    return (*(1.0,) * begin, *factors, *(1.0,) * (length - begin - len(factors)))
