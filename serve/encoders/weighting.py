"""What a weight does to the embedding of its words, by rule. Vectors (pooled, projected) stand for the whole text and
are not weighted.

    a1111     A weight multiplies the embedding of its token; then the whole row is scaled so that its mean is what it
              was before: `EmphasisOriginal` in
              https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/master/modules/sd_emphasis.py.
              The mean carries that only where it stands out from the spread of the values, as in OpenAI's CLIP (about
              a tenth of it). Where it is next to nothing, the quotient of two such means is noise that may even turn
              the sign; there the root mean square is restored instead.
    compel    A weight stretches the difference from the empty text's token; words below 1 also draw the whole text
              towards one in which nothing looks at them. Compel itself assembles it: `serve.encoders.compel_rule`.
    multiply  A weight multiplies the embedding of its token, and nothing else.

The units that a rule needs beside the text's own are told by `serve.prompts.wanted`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from serve.domain.text import EncodeUnit, Weighting
from serve.prompts.wanted import Wanted

FAINT = 0.02
"""A mean below this share of the root mean square is not a measure of size."""


def apply(wanted: Wanted, read: Callable[[EncodeUnit], torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The embedding of each row of the text, (tokens, width): float32 where it is weighted, else what `read` gives.

    `read` is asked for a unit's embedding and may be asked twice. It raises KeyError where it has none.
    """
    if wanted.rule is Weighting.COMPEL and wanted.fragments:
        # Compel comes with every pipeline of diffusers: seconds of imports, which nobody pays who does not ask for it.
        from serve.encoders.compel_rule import assemble

        return assemble(wanted, read)
    rule = multiply if wanted.rule is Weighting.MULTIPLY else emphasize
    rows = ((read(row.unit), row.weights) for row in wanted.rows)
    return tuple(row if weights is None else rule(row, weights) for row, weights in rows)


def emphasize(rows: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """A1111's rule on `rows` (tokens, width) with one weight per token, in float32 whatever they are in.

    Rows whose weights are all 1 come back untouched.
    """
    if all(weight == 1.0 for weight in weights):
        return rows
    weighted = multiply(rows, weights)
    size, new_size = rows.mean(dtype=torch.float32), weighted.mean()
    rms, new_rms = (
        torch.linalg.vector_norm(each, dtype=torch.float32) / rows.numel() ** 0.5 for each in (rows, weighted)
    )
    if size.abs() < FAINT * rms or new_size.abs() < FAINT * new_rms:
        size, new_size = rms, new_rms
    return weighted.mul_(size / new_size) if new_size != 0 else weighted


def multiply(rows: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """Each token of `rows` (tokens, width) times its weight, in float32 whatever they are in.

    Rows whose weights are all 1 come back untouched.
    """
    if all(weight == 1.0 for weight in weights):
        return rows
    return rows * torch.tensor(weights).unsqueeze(1)
