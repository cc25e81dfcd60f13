"""PixArt and AuraFlow against the stock pipelines: small models with random weights, from the text alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AuraFlowPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline
from support.image_models import auraflow_model, pixart_model
from support.parity import Pair

from serve.domain.conditioning import Conditioning
from serve.domain.orders import ImageRequest, Task


class DitPair(Pair):
    """PixArt's context has only the tokens that were written; AuraFlow's has all, those of padding are 0."""

    cut = True

    @torch.inference_mode()
    def conditioning(self, request: ImageRequest) -> Conditioning:
        positive, mask, negative, negative_mask = self._stock.encode_prompt(
            request.prompt,
            do_classifier_free_guidance=request.guided,
            negative_prompt=request.negative_prompt,
            device="cpu",
        )
        if self.cut:
            positive = positive[:, : int(mask.sum())]
            negative = negative[:, : int(negative_mask.sum())] if request.guided else None
        return Conditioning(positive[0], negative[0] if request.guided else None)

    def options(self, request: ImageRequest) -> dict[str, Any]:
        return super().options(request) | {"use_resolution_binning": False, "clean_caption": False}


class AuraFlowPair(DitPair):
    cut = False

    def options(self, request: ImageRequest) -> dict[str, Any]:
        return Pair.options(self, request)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", ["dpmpp_2m_karras", "euler_a", "ddim", "unipc", None])
def test_pixart(tmp_path: Path, sampler: str | None, guidance_scale: float) -> None:
    pair = DitPair(pixart_model(tmp_path / "sigma"), {Task.TXT2IMG: PixArtSigmaPipeline}, 64)
    pair.check(sampler=sampler, guidance_scale=guidance_scale, num_inference_steps=4)


def test_pixart_alpha(tmp_path: Path) -> None:
    pair = DitPair(pixart_model(tmp_path / "alpha", sigma=False), {Task.TXT2IMG: PixArtAlphaPipeline}, 64)
    pair.check(width=48, num_images=2, num_inference_steps=3)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", ["flow_euler", None])
def test_auraflow(tmp_path: Path, sampler: str | None, guidance_scale: float) -> None:
    pair = AuraFlowPair(auraflow_model(tmp_path / "auraflow"), {Task.TXT2IMG: AuraFlowPipeline}, 64)
    pair.check(sampler=sampler, guidance_scale=guidance_scale, num_images=2, num_inference_steps=3)
