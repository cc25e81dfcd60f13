"""What is known of the image side of a model before any of its weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from serve.domain.orders import Task
from serve.models.samplers import Process

Guidance = Literal["classifier_free", "embedded", "none"]
"""What `guidance_scale` means to a model: the w of classifier-free guidance; an input that the denoiser was distilled
on (FLUX.1 dev, latent consistency U-Nets); or nothing (FLUX.1 schnell)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoiser:
    """Sizes are pixels; latents are `vae_scale_factor` times smaller on each side.

    `size_multiple` is the grid of widths and heights; `largest_side` is the longest side that the model has positions
    for, None where any length goes. `in_channels` of an inpainting U-Net are 9: latents, mask and the masked image's
    latents; FLUX's are those before its latents are packed. `prediction_type` is "flow_prediction" for rectified flow.
    `tasks` are what it can be asked for. The three defaults are those of an order that names none; `default_strength`
    is that of img2img.
    """

    default_width: int
    default_height: int
    size_multiple: int
    vae_scale_factor: int
    latent_channels: int
    in_channels: int
    prediction_type: str
    process: Process
    guidance: Guidance
    tasks: frozenset[Task]
    default_num_inference_steps: int
    default_guidance_scale: float
    default_strength: float
    largest_side: int | None = None


FLOAT16 = frozenset({"sd", "sdxl", "sdxl_refiner"})
"""Families of U-Nets: trained in float16, whose mantissa is the longer one. The transformers overflow it."""


def best_dtype(family: str, dtypes: Sequence[str]) -> str:
    """Of what a card computes in: what the family was trained in, where the card has it, else the card's first."""
    own = "float16" if family in FLOAT16 else "bfloat16"
    return own if own in dtypes else dtypes[0]
