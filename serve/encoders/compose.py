"""Units and a plan -> the texts that the denoiser reads: the arithmetic that comes after the cache, for all families.

What weights do is `serve.encoders.weighting`'s. Shares of texts in a step, which need the device, are the step loop's;
`conditioning_at` in `serve.encoders.export` has them for a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from serve.domain.conditioning import Schedule, TextEmbedding
from serve.domain.text import EncodeUnit
from serve.encoders.codec import unpack
from serve.encoders.weighting import apply
from serve.prompts.planned import Block, Column, PromptPlan, TextPlan, Window


def compose(plan: PromptPlan, embeddings: Mapping[str, bytes]) -> Schedule:
    """`embeddings` maps the key of every unit of the plan to its packed value. Float32, on the CPU.

    Raises KeyError where a unit is missing.
    """
    table = _Table(embeddings)
    texts = [None if text.zero else _text(plan, text, table) for text in plan.texts]
    time_ids, negative_time_ids = (
        None if ids is None else torch.tensor(ids, dtype=torch.float32)
        for ids in (plan.time_ids, plan.negative_time_ids)
    )
    return Schedule(_whole(texts), plan.phases, time_ids, negative_time_ids)


class _Table:
    """Values of units. Texts of one request share many, and each is unpacked once.

    They may be shared, and are never written to.
    """

    def __init__(self, embeddings: Mapping[str, bytes]) -> None:
        self._embeddings = embeddings
        self._read: dict[EncodeUnit, torch.Tensor] = {}

    def __call__(self, unit: EncodeUnit) -> torch.Tensor:
        if unit not in self._read:
            self._read[unit] = unpack(self._embeddings[unit.key])
        return self._read[unit]


def _whole(texts: Sequence[TextEmbedding | None]) -> tuple[TextEmbedding, ...]:
    """With zeros for texts that are nothing, and for vectors that a text leaves to others."""
    first = next(text for text in texts if text is not None)
    pooled = next((text.pooled for text in texts if text is not None and text.pooled is not None), None)
    nothing = None if pooled is None else torch.zeros_like(pooled)
    whole = []
    for text in texts:
        if text is None:
            whole.append(TextEmbedding(torch.zeros_like(first.context), nothing))
        else:
            whole.append(text if text.pooled is not None else TextEmbedding(text.context, nothing))
    return tuple(whole)


def _text(plan: PromptPlan, text: TextPlan, table: _Table) -> TextEmbedding:
    """The blocks one below the other, and the vectors end to end."""
    vectors = [_mean([table(row.unit) for row in vector.rows], vector.shares) for vector in text.vectors]
    pooled = None if not vectors else vectors[0] if len(vectors) == 1 else torch.cat(vectors)
    tokens = sum(block.height for block in text.blocks)
    zeros = max(plan.zero_rows, plan.context_tokens - tokens)
    return TextEmbedding(_stack(text.blocks, zeros, plan.context_width, table), pooled)


def _stack(blocks: Sequence[Block], zero_rows: int, width: int, table: _Table) -> torch.Tensor:
    """Each value is copied once, straight to its place and into float32; a lone row not even that."""
    if len(blocks) == 1 and len(blocks[0].columns) == 1 and not zero_rows:
        rows = _rows(blocks[0].columns[0], table)
        if len(rows) == 1 and len(rows[0]) == blocks[0].height:
            return rows[0].float()
    context = torch.zeros(sum(block.height for block in blocks) + zero_rows, width)
    above = 0
    for block in blocks:
        left = 0
        for column in block.columns:
            rows, at = _rows(column, table), above + block.top
            for row in rows:
                context[at : at + len(row), left : left + row.shape[1]] = row
                at += len(row)
            left += rows[0].shape[1]
        above += block.height
    return context


def _rows(column: Column, table: _Table) -> list[torch.Tensor]:
    """The column's rows, (tokens, width) each, from top to bottom."""
    rows = list(apply(column.text, table))
    if column.windows:
        rows = _overlapped(rows, column.windows)
    if column.shares:
        rows = [_mean(rows, column.shares)]
    if column.empty is not None and column.fill:
        rows += [table(column.empty)] * column.fill
    return rows


def _overlapped(rows: Sequence[torch.Tensor], windows: Sequence[Window]) -> list[torch.Tensor]:
    """The rows, with the mean of its embeddings for each token that several of them have."""
    rows = [row.to(torch.float32, copy=True) for row in rows]
    last = max(window.first + window.tokens for window in windows)
    total, times = torch.zeros(last, rows[0].shape[1]), torch.zeros(last, 1)
    places = [(slice(each.first, each.first + each.tokens), slice(each.at, each.at + each.tokens)) for each in windows]
    for row, (text, inside) in zip(rows, places, strict=True):
        total[text] += row[inside]
        times[text] += 1
    total /= times.clamp(min=1)
    for row, (text, inside) in zip(rows, places, strict=True):
        row[inside] = total[text]
    return rows


def _mean(rows: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    """Rows of unlike lengths, too: a place that not all of them have is the mean of those that have it."""
    if len(rows) == 1:
        return rows[0].float()
    longest = max(rows, key=len)
    total, weight = torch.zeros(longest.shape), torch.zeros(len(longest))
    for row, share in zip(rows, shares, strict=True):
        total[: len(row)] += share * row.float()
        weight[: len(row)] += share
    return total / weight.reshape(-1, *(1,) * (total.ndim - 1))
