"""Stable Diffusion 3 and 3.5: rectified flow, a transformer that attends over image and text together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel

from serve.diffusion.families.base import Family, Lane
from serve.diffusion.families.batch import contexts_of, latents_of, pooled_of, timesteps_of
from serve.diffusion.families.flow import calculate_shift, list_timesteps

MAX_SHIFT = 1.16
"""Of a sampler's configuration that has none, as in `StableDiffusion3Pipeline`."""


class Sd3Family(Family):
    """The text is one sequence: both CLIPs' rows, T5's below them or zeros in its place.

    Its padding is not hidden: the transformer has no mask, and was trained on padding read like text. So rows of
    another length would be other text, and lanes with contexts of unlike lengths take turns.
    """

    pads_context = False
    part = "transformer"
    part_class = SD3Transformer2DModel

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, shape: tuple[int, int]) -> None:
        """Shifted by the image's size where the sampler's configuration asks for that (`use_dynamic_shifting`)."""
        mu = None
        if scheduler.config.get("use_dynamic_shifting"):
            patch = self.denoiser.config.patch_size
            mu = calculate_shift(scheduler.config, (shape[0] // patch) * (shape[1] // patch), MAX_SHIFT)
        list_timesteps(scheduler, num_inference_steps, mu)

    def predict(self, lanes: Sequence[Lane]) -> torch.Tensor:
        out: torch.Tensor = self.denoiser(
            hidden_states=self.place(latents_of(lanes)),
            timestep=timesteps_of(lanes, self.device),
            encoder_hidden_states=contexts_of(lanes),
            pooled_projections=pooled_of(lanes),
            return_dict=False,
        )[0]
        return out
