"""U-Nets with cross-attention: Stable Diffusion 1.x and 2.x, latent consistency models, SDXL and its refiner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel

from serve.diffusion.families.base import Family, Lane
from serve.diffusion.families.batch import latents_of, padded, pooled_of, timesteps_of
from serve.diffusion.families.load import pipeline_class

_OLD_SD = {"steps_offset": 1, "clip_sample": False}
MENDS: Mapping[str, Mapping[str, Any]] = {
    "StableDiffusionPipeline": _OLD_SD,
    "StableDiffusionImg2ImgPipeline": _OLD_SD,
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}
"""By stock pipeline; those that are not here mend nothing."""


class SdFamily(Family):
    """Stable Diffusion 1.x and 2.x: a U-Net over 4-channel latents with cross-attention to one text encoder.

    An inpainting U-Net reads 9 channels. One with `time_cond_proj_dim` (latent consistency, Luo et al. 2023) is told
    the guidance scale that it imitates.
    """

    pads_context = True
    part = "unet"
    part_class = UNet2DConditionModel
    convolutional = True
    addition: ClassVar[str | None] = None
    """The `addition_embed_type` of the family's U-Nets."""

    def mends(self) -> Mapping[str, Any]:
        return MENDS.get(pipeline_class(self.model), {})

    def check(self, config: Any) -> None:
        if config.addition_embed_type != self.addition:
            raise ValueError(f"its U-Net has the addition_embed_type {config.addition_embed_type}, not {self.addition}")
        for name in ("class_embed_type", "encoder_hid_dim_type", "num_class_embeds"):
            if config.get(name) is not None:
                raise ValueError(f"its U-Net has a {name}, which is not served")
        # Their self-attention reads the text without a mask, so that padding would be read too.
        only = config.only_cross_attention
        if only is True or (isinstance(only, Sequence) and any(only)):
            raise ValueError("its U-Net has only_cross_attention, which is not served")

    def predict(self, lanes: Sequence[Lane]) -> torch.Tensor:
        latents = latents_of(lanes)
        if extra := [lane.extra for lane in lanes if lane.extra is not None]:
            latents = torch.cat([latents, torch.cat(extra).to(latents)], dim=1)
        context, mask = padded([lane.text.context for lane in lanes])
        out: torch.Tensor = self.denoiser(
            self.place(latents),
            timesteps_of(lanes, self.device),
            encoder_hidden_states=context,
            encoder_attention_mask=mask,
            timestep_cond=self._guidance(lanes),
            added_cond_kwargs=self._added(lanes),
            return_dict=False,
        )[0]
        return out

    def _guidance(self, lanes: Sequence[Lane]) -> torch.Tensor | None:
        width = self.denoiser.config.time_cond_proj_dim
        if width is None:
            return None
        scales = torch.tensor([lane.guidance_scale - 1 for lane in lanes])
        return self.place(guidance_embedding(scales, width))

    def _added(self, lanes: Sequence[Lane]) -> dict[str, torch.Tensor] | None:
        return None


class SdxlFamily(SdFamily):
    """SDXL, its refiner (five time ids) and what is trained like it: turbo, lightning, Playground v2.5."""

    addition = "text_time"
    upcasts_vae = True

    def _added(self, lanes: Sequence[Lane]) -> dict[str, torch.Tensor]:
        time_ids = [lane.text.time_ids for lane in lanes if lane.text.time_ids is not None]
        assert len(time_ids) == len(lanes), "SDXL's conditioning has time ids"
        return {"text_embeds": pooled_of(lanes), "time_ids": torch.stack(time_ids)}


def guidance_embedding(scales: torch.Tensor, width: int) -> torch.Tensor:
    """(lanes,) -> (lanes, width), float32: sinusoids of 1000 times the scale, as diffusers' pipelines embed it."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (scales * 1000.0)[:, None] * frequencies[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, width % 2))
