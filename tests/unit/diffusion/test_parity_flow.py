"""SD 3 and FLUX against the stock pipelines: small models with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image
from support.image_models import flux_model, sd3_model, vae
from support.parity import Pair
from support.text_models import fill

from serve.domain.conditioning import Conditioning
from serve.domain.orders import ImageRequest, Task

SD3 = {
    Task.TXT2IMG: StableDiffusion3Pipeline,
    Task.IMG2IMG: StableDiffusion3Img2ImgPipeline,
    Task.INPAINT: StableDiffusion3InpaintPipeline,
}
FLUX = {Task.TXT2IMG: FluxPipeline, Task.IMG2IMG: FluxImg2ImgPipeline, Task.INPAINT: FluxInpaintPipeline}
SAMPLERS = ("flow_euler", "flow_heun", None)


class Sd3Pair(Pair):
    @torch.inference_mode()
    def conditioning(self, request: ImageRequest) -> Conditioning:
        positive, negative, pooled, negative_pooled = self._stock.encode_prompt(
            request.prompt,
            None,
            None,
            device="cpu",
            do_classifier_free_guidance=request.guided,
            negative_prompt=request.negative_prompt,
        )
        if not request.guided:
            return Conditioning(positive[0], None, pooled[0])
        return Conditioning(positive[0], negative[0], pooled[0], negative_pooled[0])

    @torch.inference_mode()
    def finished(self, pipeline: Any, request: ImageRequest, options: dict[str, Any]) -> Image.Image:
        """The stock inpainting pipeline (diffusers 0.42) forgets the VAE's shift when it decodes; the others don't."""
        if request.task is not Task.INPAINT:
            return super().finished(pipeline, request, options)
        latents = pipeline(request.prompt, **options, output_type="latent").images
        config = pipeline.vae.config
        pixels = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        return pipeline.image_processor.postprocess(pixels)[0]


class FluxPair(Pair):
    @torch.inference_mode()
    def conditioning(self, request: ImageRequest) -> Conditioning:
        positive, pooled, _ = self._stock.encode_prompt(request.prompt, None, device="cpu")
        if not request.guided:
            return Conditioning(positive[0], None, pooled[0])
        negative, negative_pooled, _ = self._stock.encode_prompt(request.negative_prompt, None, device="cpu")
        return Conditioning(positive[0], negative[0], pooled[0], negative_pooled[0])

    def request(self, task: Task, **values: Any) -> ImageRequest:
        return super().request(task, **{"true_cfg_scale": 1.0} | values)

    def options(self, request: ImageRequest) -> dict[str, Any]:
        return super().options(request) | {"true_cfg_scale": request.true_cfg_scale}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flow")


@pytest.fixture(scope="module")
def sd3(root: Path) -> Sd3Pair:
    """Of 16 channels, which the stock inpainting pipeline insists on."""
    folder = sd3_model(root / "sd3")
    config = SD3Transformer2DModel.load_config(folder / "transformer") | {"in_channels": 16, "out_channels": 16}
    transformer = SD3Transformer2DModel.from_config(config)
    fill(transformer, 0)
    transformer.save_pretrained(folder / "transformer")
    vae(0, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609).save_pretrained(folder / "vae")
    return Sd3Pair(folder, SD3, 64)


@pytest.fixture(scope="module")
def flux(root: Path) -> FluxPair:
    return FluxPair(flux_model(root / "dev"), FLUX, 64)


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sd3(sd3: Sd3Pair, sampler: str | None, task: Task) -> None:
    sd3.check(task, sampler, num_inference_steps=4)


@pytest.mark.parametrize("task", list(Task))
def test_sd3_without_guidance_at_another_size(sd3: Sd3Pair, task: Task) -> None:
    sd3.check(task, guidance_scale=1.0, width=48, num_images=2, num_inference_steps=3)


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("task", [Task.IMG2IMG, Task.INPAINT])
def test_sd3_strengths(sd3: Sd3Pair, task: Task, strength: float) -> None:
    sd3.check(task, strength=strength)


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_flux(flux: FluxPair, sampler: str | None, task: Task) -> None:
    """The stock pipelines take Heun's forward passes for steps where they leave some out: there all are made."""
    flux.check(task, sampler, num_inference_steps=4, strength=1.0 if sampler == "flow_heun" else 0.7)


@pytest.mark.parametrize("task", list(Task))
def test_flux_with_a_negative_prompt_at_another_size(flux: FluxPair, task: Task) -> None:
    flux.check(task, true_cfg_scale=2.5, width=48, num_images=2, num_inference_steps=3)


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("task", [Task.IMG2IMG, Task.INPAINT])
def test_flux_strengths(flux: FluxPair, task: Task, strength: float) -> None:
    flux.check(task, strength=strength)


@pytest.mark.parametrize("task", list(Task))
def test_flux_schnell(root: Path, task: Task) -> None:
    schnell = FluxPair(flux_model(root / f"schnell-{task}", guidance_embeds=False), FLUX, 64)
    schnell.check(task, num_inference_steps=4)
