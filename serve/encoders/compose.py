"""Units and a plan -> Conditioning: the arithmetic that comes after the cache, for all families.

A weight multiplies the embedding of its token; then the whole context of that encoder is scaled so that its mean is
what it was before. That is A1111's emphasis, `EmphasisOriginal` in
https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/master/modules/sd_emphasis.py.

The mean carries that only where it stands out from the spread of the values, as in OpenAI's CLIP (about a tenth of it).
Where it is next to nothing, the quotient of two such means is noise that may even turn the sign; there the root mean
square is restored instead. Vectors (pooled, projected) stand for the whole text and are not weighted.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from serve.domain import Conditioning
from serve.encoders.codec import unpack
from serve.prompts.plan import PromptPlan, SidePlan, UnitRead

FAINT = 0.02
"""A mean below this share of the root mean square is not a measure of size."""


def compose(plan: PromptPlan, embeddings: Mapping[str, bytes]) -> Conditioning:
    """`embeddings` maps the key of every unit of the plan to its packed value. Float32, on the CPU.

    Raises KeyError where a unit is missing.
    """
    positive, pooled = _side(plan, plan.positive, embeddings)
    negative = negative_pooled = None
    if plan.negative is not None and plan.negative.zero:
        negative = torch.zeros_like(positive)
        negative_pooled = None if pooled is None else torch.zeros_like(pooled)
    elif plan.negative is not None:
        negative, negative_pooled = _side(plan, plan.negative, embeddings)
    time_ids, negative_time_ids = (
        None if ids is None else torch.tensor(ids, dtype=torch.float32)
        for ids in (plan.time_ids, plan.negative_time_ids)
    )
    return Conditioning(positive, negative, pooled, negative_pooled, time_ids, negative_time_ids)


def _side(
    plan: PromptPlan, side: SidePlan, embeddings: Mapping[str, bytes]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The context, (tokens, context_width), and the vectors end to end."""
    blocks = [[_context(read, embeddings) for read in block] for block in side.blocks]
    vectors = [unpack(embeddings[read.unit.key]).float() for read in side.vectors]
    pooled = None if not vectors else vectors[0] if len(vectors) == 1 else torch.cat(vectors)
    tokens = sum(block[0].shape[0] for block in blocks)
    return _stack(blocks, max(plan.zero_rows, plan.context_tokens - tokens), plan.context_width), pooled


def _context(read: UnitRead, embeddings: Mapping[str, bytes]) -> torch.Tensor:
    rows = unpack(embeddings[read.unit.key])
    return rows if read.weights is None else emphasize(rows, read.weights)


def _stack(blocks: list[list[torch.Tensor]], zero_rows: int, width: int) -> torch.Tensor:
    """Each value is copied once, straight to its place and into float32; a lone encoder's context not even that."""
    if len(blocks) == 1 and len(blocks[0]) == 1 and not zero_rows:
        return blocks[0][0].float()
    context = torch.zeros(sum(block[0].shape[0] for block in blocks) + zero_rows, width)
    top = 0
    for block in blocks:
        bottom, left = top + block[0].shape[0], 0
        for rows in block:
            context[top:bottom, left : left + rows.shape[1]] = rows
            left += rows.shape[1]
        top = bottom
    return context


def emphasize(rows: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """`rows` (tokens, width) with one weight per token, in float32 whatever they are in.

    Rows whose weights are all 1 come back untouched.
    """
    if all(weight == 1.0 for weight in weights):
        return rows
    weighted = rows * torch.tensor(weights).unsqueeze(1)
    size, new_size = rows.mean(dtype=torch.float32), weighted.mean()
    rms, new_rms = (
        torch.linalg.vector_norm(each, dtype=torch.float32) / rows.numel() ** 0.5 for each in (rows, weighted)
    )
    if size.abs() < FAINT * rms or new_size.abs() < FAINT * new_rms:
        size, new_size = rms, new_rms
    return weighted.mul_(size / new_size) if new_size != 0 else weighted
