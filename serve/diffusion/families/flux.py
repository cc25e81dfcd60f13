"""FLUX.1: rectified flow, a transformer over squares of 2 x 2 latents and text together, which it places by ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel

from serve.diffusion.families.base import Family, Lane
from serve.diffusion.families.batch import contexts_of, latents_of, pooled_of, timesteps_of
from serve.diffusion.families.flow import calculate_shift, list_timesteps

MAX_SHIFT = 1.15
"""Of a sampler's configuration that has none, as in `FluxPipeline`."""


class FluxFamily(Family):
    """Latents are (1, channels, height, width) to everybody else, both sides even; they are packed here alone.

    dev reads each lane's guidance scale as a number that it was distilled on, schnell has no such input. The padding of
    T5's rows is not hidden: the transformer has no mask, and was trained on padding read like text. So lanes with
    contexts of unlike lengths take turns.
    """

    pads_context = False
    part = "transformer"
    part_class = FluxTransformer2DModel

    def check(self, config: Any) -> None:
        if config.patch_size != 1 or config.in_channels % 4:
            raise ValueError(f"its transformer reads patches of {config.patch_size} and {config.in_channels} channels")

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, shape: tuple[int, int]) -> None:
        """Even steps down from 1, shifted by the image's size where the sampler's configuration asks for that."""
        mu = calculate_shift(scheduler.config, (shape[0] // 2) * (shape[1] // 2), MAX_SHIFT)
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
        list_timesteps(scheduler, num_inference_steps, mu, sigmas)

    def predict(self, lanes: Sequence[Lane]) -> torch.Tensor:
        latents, context = self.place(latents_of(lanes)), contexts_of(lanes)
        height, width = latents.shape[-2:]
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.tensor([lane.guidance_scale for lane in lanes], device=self.device)
        out: torch.Tensor = self.denoiser(
            hidden_states=pack(latents),
            # Rounded to the denoiser's dtype before it is divided, as in the stock pipeline.
            timestep=timesteps_of(lanes, self.device).to(self.dtype) / 1000,
            guidance=guidance,
            pooled_projections=pooled_of(lanes),
            encoder_hidden_states=context,
            txt_ids=torch.zeros(context.shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=image_ids(height // 2, width // 2).to(self.device, self.dtype),
            return_dict=False,
        )[0]
        return unpack(out, height, width)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(lanes, C, h, w) -> (lanes, h/2 * w/2, 4 C): a token for each square."""
    lanes, channels, height, width = latents.shape
    squares = latents.view(lanes, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(lanes, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `pack`; `height` and `width` are those of the latents."""
    lanes, _, channels = tokens.shape
    squares = tokens.view(lanes, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(lanes, channels // 4, height, width)


def image_ids(height: int, width: int) -> torch.Tensor:
    """(height * width, 3): 0, row and column of each token, for the rotary embedding. Text is at 0, 0, 0."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return ids.view(-1, 3)
