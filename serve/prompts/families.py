"""What each family reads of its text encoders: one table, and clip skip on top of it.

It is what the stock diffusers pipelines (0.42) do in `encode_prompt`; outputs are named as in `EncodeUnit.output`.
"""

from __future__ import annotations

from collections.abc import Mapping

READS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sd": {"text_encoder": ("hidden",)},
    "sdxl": {"text_encoder": ("skip:1",), "text_encoder_2": ("skip:1", "projected")},
    "sd3": {
        "text_encoder": ("skip:1", "projected"),
        "text_encoder_2": ("skip:1", "projected"),
        "text_encoder_3": ("hidden",),
    },
    "flux": {"text_encoder": ("pooled",), "text_encoder_2": ("hidden",)},
}
"""Outputs by family and role, in role order. `projected` stands for `projected:ID` with the role's own projection."""

VECTORS = frozenset({"pooled", "projected"})
"""Outputs that are one vector per row; the others are one vector per token and go into the context."""

T5_TOKENS: Mapping[str, tuple[int, int]] = {"sd3": (256, 512), "flux": (512, 512)}
"""Length of a T5 row where the client says nothing, and the most that it may ask for."""

T5_OPTIONAL = frozenset({"sd3"})
"""Families that were trained with T5 left out now and then, so that zeros may stand in for it."""


def skipped(output: str, clip_skip: int | None) -> str:
    """The context output `clip_skip` layers before `output`; None and 0 are `output` itself.

    `hidden` keeps its final norm (StableDiffusionPipeline applies it by hand), `skip:N` never had one.
    """
    if not clip_skip:
        return output
    if output == "hidden":
        return f"skip:{clip_skip}:norm"
    return f"skip:{int(output.removeprefix('skip:')) + clip_skip}"
