"""What is encoded: rows of token ids for an encoder alone, prompts for a whole server. The seed fixes all of them."""

from __future__ import annotations

import random

import numpy as np

from serve.bench.shapes import EncoderShape
from serve.shapes.captions import held_out_prompts

_SUBJECTS = ("a castle", "an old sailor", "a fox", "a street market", "two dancers", "a teapot", "a glass bridge")
_PLACES = ("in the rain", "at dawn", "under a red sky", "on the moon", "in a quiet forest", "by the sea", "in winter")
_STYLES = ("oil painting", "35 mm photograph", "ink drawing", "watercolour", "studio light", "flat design", "pixel art")


def random_row(shape: EncoderShape, seed: int, index: int) -> tuple[int, ...]:
    """Row number `index`, laid out as the tokenizers lay out a long prompt; two numbers give two rows.

    No mask is read by these encoders, so that a short prompt costs as much as a long one.
    """
    length = shape.row_tokens
    begin, end, _ = shape.special_ids
    words = np.random.default_rng([seed, index]).integers(2, shape.vocab_size - 2, length).tolist()
    return (*begin, *words[: length - len(begin) - 1], end)


def caption_rows(shape: EncoderShape, count: int) -> list[tuple[int, ...]]:
    """A fixed set of real captions as rows, padded as usual. A word's id is drawn from its letters."""
    return [_row_of(text, shape) for text, _ in held_out_prompts(count)]


def prompt(seed: int, index: int) -> str:
    """A prompt as people write them. Two numbers give two prompts."""
    rng = random.Random(f"{seed}/{index}")
    return f"{rng.choice(_SUBJECTS)} {rng.choice(_PLACES)}, {rng.choice(_STYLES)}, number {index} of {seed}"


def _row_of(text: str, shape: EncoderShape) -> tuple[int, ...]:
    ids = [random.Random(word).randrange(2, shape.vocab_size - 2) for word in text.split()]
    begin, end, pad = shape.special_ids
    row = (*(*begin, *ids)[: shape.row_tokens - 1], end)
    return row + (pad,) * (shape.row_tokens - len(row))
