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
    "sdxl_refiner": {"text_encoder_2": ("skip:1", "projected")},
    "flux": {"text_encoder": ("pooled",), "text_encoder_2": ("hidden",)},
    "pixart": {"text_encoder": ("hidden",)},
    "auraflow": {"text_encoder": ("hidden",)},
}
"""Outputs by family and role, in role order. `projected` stands for `projected:ID` with the role's own projection."""

VECTORS = frozenset({"pooled", "projected"})
"""Outputs that are one vector per row; the others are one vector per token and go into the context."""

T5_TOKENS: Mapping[str, tuple[int, int]] = {
    "sd3": (256, 512),
    "flux": (512, 512),
    "pixart": (300, 300),
    "auraflow": (256, 256),
}
"""Length of a T5 row where the client says nothing, and the most that it may ask for."""

UNPADDED = frozenset({"pixart", "auraflow"})
"""Families that hide a T5's padding from it. What is not looked at is not written: a row ends with its text, and the
length above is the most that it can have."""

ZERO_FILLED = frozenset({"auraflow"})
"""Those of them whose denoiser reads zeros in the padding's place, up to the length above. PixArt's reads nothing."""

LOWERED = frozenset({"pixart"})
"""Families that were trained on text in small letters, without space around it."""

T5_OPTIONAL = frozenset({"sd3"})
"""Families that were trained with T5 left out now and then, so that zeros may stand in for it."""


AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""What the refiner is told of the picture, on the positive and the negative side: the stock pipeline's defaults."""


def time_ids(family: str, height: int, width: int) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Those of both sides; None for the negative side where it has the positive one's."""
    if family == "sdxl":
        return (height, width, 0, 0, height, width), None
    if family == "sdxl_refiner":
        return (height, width, 0, 0, AESTHETIC_SCORE), (height, width, 0, 0, NEGATIVE_AESTHETIC_SCORE)
    return None, None


def skipped(output: str, clip_skip: int | None) -> str:
    """The context output `clip_skip` layers before `output`; None and 0 are `output` itself.

    `hidden` keeps its final norm (StableDiffusionPipeline applies it by hand), `skip:N` never had one.
    """
    if not clip_skip:
        return output
    if output == "hidden":
        return f"skip:{clip_skip}:norm"
    return f"skip:{int(output.removeprefix('skip:')) + clip_skip}"
