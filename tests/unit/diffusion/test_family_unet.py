"""U-Net families: what `predict` gives each lane is what the stock U-Net gives it alone, and samplers are mended as the
stock pipelines' constructors mend them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file, save_file
from support.image_models import sd_model, sdxl_model, sdxl_refiner_model
from support.text_models import OPENCLIP_PROJECTION, fill

from serve.diffusion.families import open_family
from serve.diffusion.families.base import Family, Lane, Text
from serve.diffusion.families.unet import guidance_embedding
from serve.domain.conditioning import TextEmbedding
from serve.errors import OperatorError
from serve.models import check_folder
from serve.settings.pools import DiffusionSettings

CPU = torch.device("cpu")
ROW = 77
PLAIN = DiffusionSettings(channels_last=False)


def reshaped(path: Path, seed: int = 0, **config: Any) -> Path:
    """Another U-Net in the folder: the one that is there with other options."""
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(path / "unet") | config)
    fill(unet, seed)
    unet.save_pretrained(path / "unet")
    return path


def lcm_model(path: Path) -> Path:
    LCMScheduler(original_inference_steps=50, steps_offset=0).save_pretrained(sd_model(path) / "scheduler")
    file = path / "model_index.json"
    index = json.loads(file.read_text()) | {"_class_name": "LatentConsistencyModelPipeline"}
    file.write_text(json.dumps(index | {"scheduler": ["diffusers", "LCMScheduler"]}))
    return reshaped(path, time_cond_proj_dim=21)


BUILDERS: Mapping[str, Callable[[Path], Path]] = {
    "sd": sd_model,
    "sd-v": lambda path: sd_model(path, prediction_type="v_prediction"),
    "sd-inpaint": lambda path: sd_model(path, in_channels=9),
    "lcm": lcm_model,
    "sdxl": sdxl_model,
    "sdxl-inpaint": lambda path: sdxl_model(path, in_channels=9),
    "refiner": sdxl_refiner_model,
}
KINDS = tuple(BUILDERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    return lambda kind: root / kind if (root / kind).exists() else BUILDERS[kind](root / kind)


def opened(path: Path, settings: DiffusionSettings = PLAIN, dtype: torch.dtype = torch.float32) -> Family:
    return open_family(check_folder(path, path.name), CPU, dtype, settings)


def lanes_of(family: Family, tokens: tuple[int, ...], shape: tuple[int, int] = (8, 6), seed: int = 0) -> list[Lane]:
    """Lanes that differ in everything that they may differ in; timesteps of several dtypes, as samplers have them."""
    config, generator = family.denoiser.config, torch.Generator().manual_seed(seed)

    def noise(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(family.dtype)

    ids = 5 if family.model.family == "sdxl_refiner" else 6
    sdxl = config.addition_embed_type is not None
    timesteps = (torch.tensor(981), torch.tensor(13.25), torch.tensor(500, dtype=torch.int32), torch.tensor(-0.75))
    return [
        Lane(
            latents=noise(1, 4, *shape),
            timestep=timesteps[index % len(timesteps)],
            text=Text(
                noise(count, config.cross_attention_dim),
                noise(OPENCLIP_PROJECTION) if sdxl else None,
                torch.arange(index, index + ids).to(family.dtype) * 64 if sdxl else None,
            ),
            guidance_scale=2.0 + 3 * index,
            extra=noise(1, config.in_channels - 4, *shape) if config.in_channels > 4 else None,
        )
        for index, count in enumerate(tokens)
    ]


def stock(unet: Any, lane: Lane) -> torch.Tensor:
    """One lane as a stock pipeline calls its U-Net."""
    latents = lane.latents if lane.extra is None else torch.cat([lane.latents, lane.extra], dim=1)
    width = unet.config.time_cond_proj_dim
    condition = None
    if width is not None:
        scale = torch.tensor(lane.guidance_scale - 1).repeat(1)
        condition = StableDiffusionPipeline.get_guidance_scale_embedding(None, scale, embedding_dim=width)
    added = None
    if lane.text.pooled is not None and lane.text.time_ids is not None:
        added = {"text_embeds": lane.text.pooled[None], "time_ids": lane.text.time_ids[None]}
    with torch.inference_mode():
        return unet(
            latents,
            lane.timestep,
            encoder_hidden_states=lane.text.context[None],
            timestep_cond=condition,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]


@torch.inference_mode()
def predict(family: Family, lanes: list[Lane]) -> torch.Tensor:
    return family.predict(lanes)


@pytest.mark.parametrize("kind", KINDS)
def test_one_lane_is_the_stock_unet_to_the_bit(folder: Callable[[str], Path], kind: str) -> None:
    family = opened(folder(kind))
    unet = UNet2DConditionModel.from_pretrained(folder(kind) / "unet").eval()
    for lane in lanes_of(family, (ROW, ROW, 2 * ROW, ROW)):
        assert torch.equal(predict(family, [lane]), stock(unet, lane))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [(ROW,) * 4, (ROW, 2 * ROW, 3 * ROW, ROW, 1)], ids=["equal", "mixed"])
def test_lanes_of_one_forward_do_not_touch_each_other(
    folder: Callable[[str], Path], kind: str, tokens: tuple[int, ...]
) -> None:
    """Different timesteps, guidance, time ids and lengths of text; odd latent sizes."""
    family = opened(folder(kind), DiffusionSettings())
    unet = UNet2DConditionModel.from_pretrained(folder(kind) / "unet").eval()
    for shape in ((8, 6), (7, 9)):
        lanes = lanes_of(family, tokens, shape)
        found = predict(family, lanes)
        assert (found.shape, found.dtype) == ((len(lanes), 4, *shape), torch.float32)
        for lane, ours in zip(lanes, found, strict=True):
            assert torch.allclose(ours, stock(unet, lane)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padding_stays_hidden_in_half_precision(folder: Callable[[str], Path], dtype: torch.dtype) -> None:
    """A padded lane is what it is alone, within the dtype's rounding; and exactly the same beside any other text."""
    family = opened(folder("sdxl"), dtype=dtype)
    one, two, other = lanes_of(family, (ROW, 2 * ROW, 2 * ROW))
    beside = predict(family, [one, two])[0]
    assert beside.dtype == dtype
    assert torch.equal(beside, predict(family, [one, other])[0])
    assert torch.allclose(beside, predict(family, [one])[0], atol=torch.finfo(dtype).eps * 16)


def test_the_guidance_embedding_is_the_stock_one() -> None:
    scales = torch.tensor([0.0, 0.5, 6.5, 11.0])
    for width in (8, 21, 256):
        expected = StableDiffusionPipeline.get_guidance_scale_embedding(None, scales, embedding_dim=width)
        assert torch.equal(guidance_embedding(scales, width), expected)


def test_guidance_reaches_an_lcm_unet(folder: Callable[[str], Path]) -> None:
    family = opened(folder("lcm"))
    lane = lanes_of(family, (ROW,))[0]
    other = Lane(lane.latents, lane.timestep, lane.text, lane.guidance_scale + 1)
    assert not torch.allclose(predict(family, [lane]), predict(family, [other]), atol=1e-3)


def test_attention_is_torchs_own_everywhere(folder: Callable[[str], Path]) -> None:
    family = opened(folder("sdxl"))
    vae = AutoencoderKL.from_pretrained(folder("sdxl") / "vae")
    for part in (family.denoiser, vae):
        assert {type(each) for each in part.attn_processors.values()} == {AttnProcessor2_0}


@pytest.mark.parametrize(("wanted", "expected"), [(None, True), (True, True), (False, False)])
def test_convolutions_are_channels_last_unless_the_operator_says_no(
    folder: Callable[[str], Path], wanted: bool | None, expected: bool
) -> None:
    family = opened(folder("sd"), DiffusionSettings(channels_last=wanted))
    weight = family.denoiser.down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is expected
    assert weight.is_contiguous() is not expected


def test_a_text_comes_to_the_device_in_the_dtype_of_the_denoiser(folder: Callable[[str], Path]) -> None:
    family = opened(folder("refiner"), dtype=torch.bfloat16)
    context, pooled, ids = torch.randn(ROW, 48), torch.randn(28), torch.arange(5.0)
    text = family.text(TextEmbedding(context, pooled), ids)
    for found, expected in ((text.context, context), (text.pooled, pooled), (text.time_ids, ids)):
        assert found is not None
        assert torch.equal(found, expected.bfloat16())
    alone = family.text(TextEmbedding(context))
    assert (alone.pooled, alone.time_ids) == (None, None)


@pytest.mark.parametrize(
    ("kind", "pipeline", "scheduler"),
    [
        ("sd", StableDiffusionPipeline, DDIMScheduler(steps_offset=0, clip_sample=True)),
        ("sd", StableDiffusionPipeline, PNDMScheduler(steps_offset=0, skip_prk_steps=False)),
        ("sd-inpaint", StableDiffusionInpaintPipeline, PNDMScheduler(steps_offset=0, skip_prk_steps=False)),
        ("sd-inpaint", StableDiffusionInpaintPipeline, DDIMScheduler(steps_offset=0, clip_sample=True)),
    ],
    ids=["sd-ddim", "sd-pndm", "inpaint-pndm", "inpaint-ddim"],
)
def test_old_samplers_are_mended_as_the_stock_pipeline_mends_them(
    tmp_path: Path, kind: str, pipeline: Any, scheduler: Any
) -> None:
    path = BUILDERS[kind](tmp_path / "model")
    scheduler.save_pretrained(path / "scheduler")
    file = path / "model_index.json"
    index = json.loads(file.read_text()) | {"scheduler": ["diffusers", type(scheduler).__name__]}
    file.write_text(json.dumps(index))
    family = opened(path)
    expected = dict(pipeline.from_pretrained(path, safety_checker=None, feature_extractor=None).scheduler.config)
    assert family.scheduler_class is type(scheduler)
    assert {name: family.scheduler_config.get(name) for name in expected if not name.startswith("_")} == {
        name: value for name, value in expected.items() if not name.startswith("_")
    }


def test_lcm_and_sdxl_samplers_are_left_as_they_are(folder: Callable[[str], Path], tmp_path: Path) -> None:
    lcm = opened(folder("lcm"))
    assert (lcm.scheduler_class, lcm.scheduler_config["steps_offset"]) == (LCMScheduler, 0)
    # Playground v2.5 is an SDXL with a sampler of its own.
    path = sdxl_model(tmp_path / "playground")
    EDMDPMSolverMultistepScheduler(sigma_max=80.0).save_pretrained(path / "scheduler")
    file = path / "model_index.json"
    index = json.loads(file.read_text()) | {"scheduler": ["diffusers", "EDMDPMSolverMultistepScheduler"]}
    file.write_text(json.dumps(index))
    playground = opened(path)
    assert playground.scheduler_class is EDMDPMSolverMultistepScheduler
    assert playground.scheduler_config["sigma_max"] == 80.0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"only_cross_attention": True}, "only_cross_attention"),
        ({"num_class_embeds": 3}, "num_class_embeds"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
    ],
)
def test_a_unet_that_asks_for_more_is_refused_at_start(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    path = reshaped(sd_model(tmp_path / "odd"), **config)
    with pytest.raises(OperatorError, match=reason) as raised:
        opened(path)
    assert raised.value.param == "model.source"


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = sd_model(tmp_path / "half")
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["mid_block.resnets.0.conv1.weight"]
    save_file(tensors, weights)
    with pytest.raises(OperatorError, match=r"unet has no tensor mid_block.resnets.0.conv1.weight") as raised:
        opened(path)
    assert raised.value.param == "model.source"
