"""AuraFlow: rectified flow, a transformer that attends over image and text together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AuraFlowTransformer2DModel

from serve.diffusion.families.base import Family, Lane
from serve.diffusion.families.batch import contexts_of, latents_of, timesteps_of


class AuraFlowFamily(Family):
    """A context is filled up with zeros, which the transformer reads: it has no mask. So lanes with contexts of unlike
    lengths take turns. The sampler's timesteps are its own, whatever the image's size.
    """

    pads_context = False
    part = "transformer"
    part_class = AuraFlowTransformer2DModel
    upcasts_vae = True

    def predict(self, lanes: Sequence[Lane]) -> torch.Tensor:
        out: torch.Tensor = self.denoiser(
            self.place(latents_of(lanes)),
            encoder_hidden_states=contexts_of(lanes),
            timestep=self.place(timesteps_of(lanes, self.device) / 1000),
            return_dict=False,
        )[0]
        return out
