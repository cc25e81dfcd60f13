"""Compel's rule for weights, by Compel's own assembly over embeddings that are there already.

Compel asks a text encoder for rows and does the arithmetic on what comes back
(https://github.com/damian0815/compel, `EmbeddingsProvider`). Here a table answers in the encoder's place, so that no
weight costs a forward: the row itself, the row with words hidden (Compel's default, `DownweightMode.MASK`), and the
empty text's row.

    weight w      empty + w * (row - empty), token by token
    words at w<1  then the mean of that and, for each such fragment, the same without it, with tan((1 - w) * pi/2) as
                  its share beside 1: half-way at 0.5, nothing left at 0

Compel reads a long text as one sequence, and so the shares of a fragment count in every row of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from compel import EmbeddingsProvider

from serve.domain.text import EncodeUnit
from serve.prompts.wanted import Wanted

LEAST = 1e-5
"""The weight that Compel takes for 0 and less: the tangent has no end there."""

_TOKENIZER = SimpleNamespace(bos_token_id=None, eos_token_id=None, pad_token_id=0)
"""Compel spells the empty text itself before it asks for it. The table needs no spelling to know it."""


class _Table:
    """In the place of a text encoder: one row of the text as it is, without some of its words, and the empty text's.

    Compel masks every row that it asks for but the empty one.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, empty: torch.Tensor, rows: Mapping[tuple[int, ...], torch.Tensor]) -> None:
        """`rows` by the positions that are hidden in them; each tensor is (tokens, width), in float32."""
        self._empty = empty
        self._rows = rows

    def __call__(self, _: torch.Tensor, mask: torch.Tensor | None, **__: Any) -> SimpleNamespace:
        row = self._empty if mask is None else self._rows[tuple((mask[0] == 0).nonzero().flatten().tolist())]
        return SimpleNamespace(last_hidden_state=row.unsqueeze(0))


def assemble(wanted: Wanted, read: Callable[[EncodeUnit], torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The embedding of each row of the text, (tokens, width), in float32. Rows that no weight touches come back as
    `read` gives them."""
    return tuple(_row(wanted, index, read) for index in range(len(wanted.rows)))


def _row(wanted: Wanted, index: int, read: Callable[[EncodeUnit], torch.Tensor]) -> torch.Tensor:
    assert wanted.empty is not None
    row = wanted.rows[index]
    if all(fragment.without[index] is None for fragment in wanted.fragments):
        return read(row.unit)
    less = [(fragment.without[index], fragment.weight) for fragment in wanted.fragments if fragment.weight < 1.0]
    length = len(row.unit.token_ids)
    units = (row.unit, *(unit for unit, _ in less if unit is not None))
    table = _Table(read(wanted.empty)[:length].float(), {unit.hidden: read(unit).float() for unit in units})
    compel = EmbeddingsProvider(_TOKENIZER, table, model_max_length=length)
    ids, weights = torch.zeros(length, dtype=torch.long), torch.tensor(row.weights)

    def build(hidden: tuple[int, ...]) -> torch.Tensor:
        mask = torch.ones(length, dtype=torch.long)
        mask[list(hidden)] = 0
        built: torch.Tensor = compel.build_weighted_embedding_tensor(ids, weights, mask)
        return built[0]

    whole = build(())
    if len(units) == 1:
        return whole
    parts = [whole, *(whole if unit is None else build(unit.hidden) for unit, _ in less)]
    shares = [1.0, *(math.tan((1.0 - max(LEAST, weight)) * math.pi / 2) for _, weight in less)]
    mixed: torch.Tensor = compel.apply_embedding_weights(torch.stack(parts).unsqueeze(0), shares, normalize=True)
    return mixed[0]
