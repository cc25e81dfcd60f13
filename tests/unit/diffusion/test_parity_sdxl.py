"""SDXL and its refiner against the stock pipelines: small models with random weights."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from support.image_models import playground_model, sdxl_model
from support.parity import Pair
from support.text_models import OPENCLIP, OPENCLIP_PROJECTION, fill

from serve.diffusion.samplers import Track
from serve.domain.conditioning import Conditioning
from serve.domain.orders import ImageRequest, Task
from serve.errors import InvalidRequest
from serve.models.samplers import sampler_names

PIPELINES = {
    Task.TXT2IMG: StableDiffusionXLPipeline,
    Task.IMG2IMG: StableDiffusionXLImg2ImgPipeline,
    Task.INPAINT: StableDiffusionXLInpaintPipeline,
}
FOUR = ("dpmpp_2m_karras", "euler_a", "ddim", "unipc")


class SdxlPair(Pair):
    @torch.inference_mode()
    def conditioning(self, request: ImageRequest) -> Conditioning:
        positive, negative, pooled, negative_pooled = self._stock.encode_prompt(
            request.prompt,
            device="cpu",
            do_classifier_free_guidance=request.guided,
            negative_prompt=request.negative_prompt,
        )
        time_ids, negative_time_ids = self.time_ids(request)
        return Conditioning(
            positive[0],
            negative[0] if request.guided else None,
            pooled[0],
            negative_pooled[0] if request.guided else None,
            torch.tensor(time_ids),
            torch.tensor(negative_time_ids),
        )

    def time_ids(self, request: ImageRequest) -> tuple[list[float], list[float]]:
        ids = [float(each) for each in (request.height, request.width, 0, 0, request.height, request.width)]
        return ids, ids


class RefinerPair(SdxlPair):
    def time_ids(self, request: ImageRequest) -> tuple[list[float], list[float]]:
        size = [float(each) for each in (request.height, request.width, 0, 0)]
        return [*size, 6.0], [*size, 2.5]

    def flags(self, optional: set[str]) -> dict[str, bool]:
        return super().flags(optional) | {"requires_aesthetics_score": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sdxl")


@pytest.fixture(scope="module")
def small(root: Path) -> SdxlPair:
    return SdxlPair(sdxl_model(root / "small"), PIPELINES, 64)


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize("sampler", [*FOUR, None])
def test_a_small_model(small: SdxlPair, sampler: str | None, task: Task) -> None:
    small.check(task, sampler, num_inference_steps=4)


@pytest.mark.parametrize("task", list(Task))
def test_without_guidance_at_another_size(small: SdxlPair, task: Task) -> None:
    small.check(task, guidance_scale=1.0, width=48, num_images=2, num_inference_steps=3)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_unet_that_reads_the_mask(root: Path, strength: float) -> None:
    folder = sdxl_model(root / f"inpainting-{strength}", in_channels=9)
    pair = SdxlPair(folder, {Task.INPAINT: StableDiffusionXLInpaintPipeline}, 64)
    for sampler in (*FOUR, None):
        pair.check(Task.INPAINT, sampler, strength=strength, num_inference_steps=4)


@pytest.mark.parametrize("sampler", [*FOUR, None])
def test_the_refiner(root: Path, sampler: str | None) -> None:
    folder = root / f"refiner-{sampler}"
    refiner = RefinerPair(refiner_model(folder), {Task.IMG2IMG: StableDiffusionXLImg2ImgPipeline}, 64)
    refiner.check(Task.IMG2IMG, sampler, strength=0.5, num_inference_steps=6)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_the_refiner_inpaints(root: Path, strength: float) -> None:
    folder = root / f"refiner-inpainting-{strength}"
    refiner = RefinerPair(refiner_model(folder), {Task.INPAINT: StableDiffusionXLInpaintPipeline}, 64)
    for sampler in ("euler_a", None):
        refiner.check(Task.INPAINT, sampler, strength=strength, num_inference_steps=5)


@pytest.fixture(scope="module")
def playground(root: Path) -> SdxlPair:
    return SdxlPair(playground_model(root / "playground"), PIPELINES, 64)


@pytest.mark.parametrize("task", [Task.TXT2IMG, Task.IMG2IMG])
@pytest.mark.parametrize("sampler", [*sampler_names("edm"), None])
def test_playground(playground: SdxlPair, sampler: str | None, task: Task) -> None:
    """Inpainting is not compared: diffusers' forgets the mean and the spread of the latents there."""
    assert playground.model.denoiser is not None
    assert playground.model.denoiser.process == "edm"
    playground.check(task, sampler, num_images=2)
    playground.check(task, sampler, guidance_scale=1.0, num_inference_steps=2)


@pytest.mark.parametrize("sampler", ["edm_euler", "edm_dpmpp_2m"])
def test_playground_keeps_what_is_not_repainted(playground: SdxlPair, sampler: str) -> None:
    request = playground.request(Task.INPAINT, scheduler=sampler)
    work = playground.work(request)
    source = playground.runner.encode(work)
    assert source is not None
    row = playground.runner.rows(work)[0]
    playground.runner.begin(row, work, source)
    for _ in range(row.steps):
        assert not playground.runner.step([row])
    latents, start = playground.runner.release(row).tensor, source.starts[0]
    assert start.image is not None
    assert start.mask is not None
    kept = (start.mask == 0).expand_as(latents)
    assert torch.equal(latents[kept], start.image[kept])


def test_playground_has_samplers_of_its_own(playground: SdxlPair) -> None:
    with pytest.raises(InvalidRequest, match="euler"):
        playground.runner.rows(playground.work(playground.request(Task.TXT2IMG, scheduler="euler")))


def test_previews_of_playground_show_its_estimate(playground: SdxlPair) -> None:
    """What EDM's sampler itself takes the finished latents to be (Karras et al. 2022, equation 7)."""
    generator = torch.Generator().manual_seed(1)
    for sampler in (*sampler_names("edm"), None):
        request = playground.request(Task.TXT2IMG, scheduler=sampler, num_inference_steps=4)
        track = Track(playground.runner.family, request, (16, 16))
        latents = torch.randn(1, 4, 16, 16, generator=generator) * track.scheduler.init_noise_sigma
        while not track.ended:
            track.model_input(latents)
            level, prediction = float(track.scheduler.sigmas[track.done]), torch.randn_like(latents)
            skip, out = 0.25 / (level**2 + 0.25), level * 0.5 / (level**2 + 0.25) ** 0.5
            found = track.original(prediction, latents)
            assert torch.allclose(found, skip * latents + out * prediction, atol=1e-4)
            latents = track.advance(prediction, latents, generator)


def refiner_model(path: Path) -> Path:
    """One text encoder, and time ids that end in an aesthetic score."""
    sdxl_model(path)
    config = UNet2DConditionModel.load_config(path / "unet") | {
        "cross_attention_dim": OPENCLIP["hidden_size"],
        "projection_class_embeddings_input_dim": OPENCLIP_PROJECTION + 5 * 8,
    }
    unet = UNet2DConditionModel.from_config(config)
    fill(unet, 0)
    unet.save_pretrained(path / "unet")
    file = path / "model_index.json"
    index = json.loads(file.read_text()) | {"_class_name": "StableDiffusionXLImg2ImgPipeline"}
    index |= {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
    file.write_text(json.dumps(index))
    return path
