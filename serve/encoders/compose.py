"""Units and a plan -> Conditioning: the arithmetic that comes after the cache, family `sd`.

A weight multiplies the embedding of its token; then the whole row is scaled so that its mean is what it was before.
That is A1111's emphasis, `EmphasisOriginal` in
https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/master/modules/sd_emphasis.py.

The mean carries that only where it stands out from the spread of the values, as in OpenAI's CLIP (about a tenth of it).
Where it is next to nothing, the quotient of two such means is noise that may even turn the sign; there the root mean
square is restored instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from serve.domain import Conditioning
from serve.encoders.codec import unpack
from serve.prompts.plan import PromptPlan, SidePlan

FAINT = 0.02
"""A mean below this share of the root mean square is not a measure of size."""


def compose(plan: PromptPlan, embeddings: Mapping[str, bytes]) -> Conditioning:
    """`embeddings` maps the key of every unit of the plan to its packed value. Float32, (tokens, width), on the CPU.

    Raises KeyError where a unit is missing.
    """
    positive = _side(plan.positive, embeddings)
    return Conditioning(positive, None if plan.negative is None else _side(plan.negative, embeddings))


def _side(side: SidePlan, embeddings: Mapping[str, bytes]) -> torch.Tensor:
    rows = torch.cat([unpack(embeddings[unit.key]) for unit in side.units]).float()
    return emphasize(rows, side.weights)


def emphasize(rows: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """`rows` (tokens, width) with one weight per token. Rows whose weights are all 1 come back untouched."""
    if all(weight == 1.0 for weight in weights):
        return rows
    weighted = rows * torch.tensor(weights, dtype=rows.dtype).unsqueeze(1)
    size, new_size = rows.mean(), weighted.mean()
    rms, new_rms = rows.square().mean().sqrt(), weighted.square().mean().sqrt()
    if size.abs() < FAINT * rms or new_size.abs() < FAINT * new_rms:
        size, new_size = rms, new_rms
    return weighted * (size / new_size) if new_size != 0 else weighted
