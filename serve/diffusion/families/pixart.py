"""PixArt-Alpha and -Sigma: a transformer (DiT) that looks at its text by cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel

from serve.diffusion.families.base import Family, Lane
from serve.diffusion.families.batch import latents_of, padded, timesteps_of

CONDITIONED_SAMPLE_SIZE = 128
"""`sample_size` of the transformers that are told the image's size: the stock pipelines' rule."""


class PixArtFamily(Family):
    """A context has as many tokens as were written. The transformer hides padding (`encoder_attention_mask`), so that
    lanes of any lengths share a forward pass: what is masked adds exactly nothing.
    """

    pads_context = True
    part = "transformer"
    part_class = PixArtTransformer2DModel

    def predict(self, lanes: Sequence[Lane]) -> torch.Tensor:
        latents = self.place(latents_of(lanes))
        context, mask = padded([lane.text.context for lane in lanes])
        out: torch.Tensor = self.denoiser(
            latents,
            encoder_hidden_states=context,
            encoder_attention_mask=mask,
            timestep=timesteps_of(lanes, self.device),
            added_cond_kwargs=self._sizes(len(lanes), *latents.shape[-2:]),
            return_dict=False,
        )[0]
        # The second half of the channels is the variance that a learned-variance sampler would read.
        channels = latents.shape[1]
        return out[:, :channels] if self.denoiser.config.out_channels // 2 == channels else out

    def _sizes(self, lanes: int, height: int, width: int) -> dict[str, Any]:
        """The image's size and shape in pixels, for latents of `height` x `width`."""
        if self.denoiser.config.sample_size != CONDITIONED_SAMPLE_SIZE:
            return {"resolution": None, "aspect_ratio": None}
        factor = self.vae.scale_factor
        resolution = self.place(torch.tensor([height * factor, width * factor]))
        ratio = self.place(torch.tensor([height / width]))
        return {"resolution": resolution.repeat(lanes, 1), "aspect_ratio": ratio.repeat(lanes, 1)}
