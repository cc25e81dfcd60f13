"""Stable Diffusion against the stock pipelines: the shipped model, and small ones with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from support.image_models import lcm_model, sd_model
from support.parity import Pair

from serve.domain.conditioning import Conditioning
from serve.domain.orders import ImageRequest, Task
from serve.errors import InvalidRequest
from serve.models.folder import SHIPPED
from serve.models.samplers import sampler_names

PIPELINES = {
    Task.TXT2IMG: StableDiffusionPipeline,
    Task.IMG2IMG: StableDiffusionImg2ImgPipeline,
    Task.INPAINT: StableDiffusionInpaintPipeline,
}
FOUR = ("dpmpp_2m_karras", "euler_a", "ddim", "unipc")


class SdPair(Pair):
    @torch.inference_mode()
    def conditioning(self, request: ImageRequest) -> Conditioning:
        positive, negative = self._stock.encode_prompt(
            request.prompt, "cpu", 1, request.guided, request.negative_prompt
        )
        return Conditioning(positive[0], negative[0] if request.guided else None)


@pytest.fixture(scope="module")
def shipped() -> SdPair:
    return SdPair(SHIPPED, PIPELINES, 64)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SdPair:
    return SdPair(sd_model(tmp_path_factory.mktemp("sd") / "small"), PIPELINES, 64)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_shipped_model(shipped: SdPair, guidance_scale: float) -> None:
    shipped.check(guidance_scale=guidance_scale, width=128, height=96, num_images=2)


@pytest.mark.parametrize("sampler", sampler_names("diffusion"))
def test_every_sampler(shipped: SdPair, sampler: str) -> None:
    shipped.check(sampler=sampler)


@pytest.mark.parametrize("task", [Task.IMG2IMG, Task.INPAINT])
@pytest.mark.parametrize("sampler", [*sampler_names("diffusion"), None])
def test_every_sampler_from_an_image(shipped: SdPair, sampler: str | None, task: Task) -> None:
    shipped.check(task, sampler)


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize("sampler", [*FOUR, None])
def test_a_small_model(small: SdPair, sampler: str | None, task: Task) -> None:
    small.check(task, sampler)


@pytest.mark.parametrize("task", list(Task))
def test_images_of_one_request(small: SdPair, task: Task) -> None:
    small.check(task, "euler_a", num_images=2, num_inference_steps=4)


@pytest.mark.parametrize("task", [Task.IMG2IMG, Task.INPAINT])
@pytest.mark.parametrize("sampler", ["dpmpp_2m_karras", "heun", "pndm"])
@pytest.mark.parametrize("strength", [0.26, 1.0])
def test_strengths(small: SdPair, task: Task, sampler: str, strength: float) -> None:
    """1.0 is pure noise for inpainting, and as much noise as the first step has for img2img."""
    small.check(task, sampler, strength=strength, guidance_scale=1.0)


@pytest.mark.parametrize("task", list(Task))
def test_v_prediction(tmp_path: Path, task: Task) -> None:
    """Stable Diffusion 2.1's."""
    SdPair(sd_model(tmp_path / "v", prediction_type="v_prediction"), PIPELINES, 64).check(task, "dpmpp_2m_karras")


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> SdPair:
    folder = sd_model(tmp_path_factory.mktemp("sd") / "inpainting", in_channels=9)
    return SdPair(folder, {Task.INPAINT: StableDiffusionInpaintPipeline}, 64)


@pytest.mark.parametrize("sampler", [*FOUR, None])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_unet_that_reads_the_mask(inpainting: SdPair, sampler: str | None, strength: float) -> None:
    inpainting.check(Task.INPAINT, sampler, strength=strength, num_images=2)


def test_a_strength_of_less_than_a_step_makes_one(small: SdPair) -> None:
    request = small.request(Task.IMG2IMG, strength=0.01)
    assert [row.steps for row in small.runner.rows(small.work(request))] == [1]


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_a_sampler_that_can_not_make_so_many_steps_says_so(small: SdPair, sampler: str) -> None:
    request = small.request(Task.TXT2IMG, scheduler=sampler, num_inference_steps=80)
    with pytest.raises(InvalidRequest, match="80 steps") as refused:
        small.runner.rows(small.work(request))
    assert refused.value.param == "num_inference_steps"


class LcmPair(SdPair):
    def request(self, task: Task, **values: Any) -> ImageRequest:
        return super().request(task, **{"true_cfg_scale": 1.0, "guidance_scale": 8.5} | values)

    def options(self, request: ImageRequest) -> dict[str, Any]:
        return {"guidance_scale": request.guidance_scale}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> LcmPair:
    pipelines = {
        Task.TXT2IMG: LatentConsistencyModelPipeline,
        Task.IMG2IMG: LatentConsistencyModelImg2ImgPipeline,
        Task.INPAINT: StableDiffusionInpaintPipeline,
    }
    return LcmPair(lcm_model(tmp_path_factory.mktemp("sd") / "lcm"), pipelines, 64)


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize("sampler", [None, "lcm"])
def test_latent_consistency(distilled: LcmPair, sampler: str | None, task: Task) -> None:
    for steps, guidance_scale in ((4, 8.5), (8, 1.5)):
        distilled.check(task, sampler, num_inference_steps=steps, guidance_scale=guidance_scale, num_images=2)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_latent_consistency_makes_all_its_steps_from_an_image(distilled: LcmPair, strength: float) -> None:
    distilled.check(Task.IMG2IMG, num_inference_steps=6, strength=strength)
    request = distilled.request(Task.IMG2IMG, num_inference_steps=6, strength=strength)
    assert [row.steps for row in distilled.runner.rows(distilled.work(request))] == [6]


def test_latent_consistency_with_more_steps_than_the_image_leaves(distilled: LcmPair) -> None:
    """50 * 0.1 timesteps are left."""
    request = distilled.request(Task.IMG2IMG, num_inference_steps=6, strength=0.1)
    with pytest.raises(InvalidRequest, match="6 steps") as refused:
        distilled.runner.rows(distilled.work(request))
    assert refused.value.param == "num_inference_steps"


@pytest.mark.parametrize("task", list(Task))
def test_large_images_are_tiled_as_in_diffusers(small: SdPair, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large is more than a tile has pixels."""
    monkeypatch.setattr(small.runner.family.vae, "tile", 64)
    stock = small.stock_vae
    monkeypatch.setattr(stock, "use_tiling", True)
    monkeypatch.setattr(stock, "tile_sample_min_size", 64)
    monkeypatch.setattr(stock, "tile_latent_min_size", 16)
    small.check(task, width=96, height=80, num_inference_steps=3)


def test_a_sampler_of_another_kind_of_model_is_refused(small: SdPair) -> None:
    with pytest.raises(InvalidRequest, match="flow_euler"):
        small.runner.rows(small.work(small.request(Task.TXT2IMG, scheduler="flow_euler")))
