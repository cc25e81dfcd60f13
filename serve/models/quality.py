"""Steps by a word of quality, for clients that don't count them."""

from __future__ import annotations

from collections.abc import Mapping

QUALITIES: Mapping[str, float] = {"low": 0.5, "medium": 1.0, "high": 1.5, "xhigh": 2.0, "max": 3.0}
"""Of the steps that the model is made for, how many each takes."""


def quality_steps(default: int, most: int) -> dict[str, int]:
    """Denoising steps by quality, of a model whose own number is `default`: at least 1, and no more than `most`."""
    return {quality: min(max(round(default * share), 1), most) for quality, share in QUALITIES.items()}
