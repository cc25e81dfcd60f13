"""Families with a transformer: one call for lanes that have nothing in common, and a stock scheduler around it, against
the stock transformers and pipelines."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from support.image_models import auraflow_model, flux_model, pixart_model, sd3_model

from serve.diffusion.families import open_family
from serve.diffusion.families.base import Family, Lane, Text
from serve.diffusion.families.flux import image_ids, pack, unpack
from serve.domain.conditioning import Conditioning, Schedule
from serve.errors import OperatorError
from serve.models.folder import check_folder
from serve.settings.pools import DiffusionSettings

MODELS: Mapping[str, Callable[[Path], Path]] = {
    "sd3": sd3_model,
    "sd3-single-attention": lambda path: sd3_model(path, dual_attention=False),
    "flux-dev": flux_model,
    "flux-schnell": lambda path: flux_model(path, guidance_embeds=False),
    "pixart-sigma": pixart_model,
    "pixart-alpha": lambda path: pixart_model(path, sigma=False),
    "auraflow": auraflow_model,
}
PROMPT, NEGATIVE = "A Red circle on blue", "a blurry square"
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Pair:
    """A family, and the stock pipeline of the same folder."""

    family: Family
    pipeline: Any


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make(root / name) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def pairs(folders: Mapping[str, Path]) -> Mapping[str, Pair]:
    return {name: Pair(opened(folder), stock(folder)) for name, folder in folders.items()}


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Family:
    return open_family(check_folder(folder, folder.name), CPU, dtype, DiffusionSettings())


def stock(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def conditioning(pipeline: Any, negative: str | None) -> Conditioning:
    """The stock pipeline's own text: what is tested here is what comes after it."""
    name = type(pipeline).__name__
    if name.startswith("PixArt"):
        text, mask, minus, minus_mask = pipeline.encode_prompt(PROMPT, negative is not None, negative or "")
        return Conditioning(text[0, mask[0].bool()], None if minus is None else minus[0, minus_mask[0].bool()])
    if name == "AuraFlowPipeline":
        text, _, minus, _ = pipeline.encode_prompt(PROMPT, negative, negative is not None)
        return Conditioning(text[0], None if minus is None else minus[0])
    if name == "StableDiffusion3Pipeline":
        guided = negative is not None
        found = pipeline.encode_prompt(
            PROMPT, None, None, negative_prompt=negative, do_classifier_free_guidance=guided, max_sequence_length=24
        )
        return Conditioning(*(None if each is None else each[0] for each in found))
    (text, pooled, _), minus = flux_text(pipeline, PROMPT), None if negative is None else flux_text(pipeline, negative)
    if minus is None:
        return Conditioning(text[0], None, pooled[0])
    return Conditioning(text[0], minus[0][0], pooled[0], minus[1][0])


def flux_text(pipeline: Any, prompt: str) -> Any:
    return pipeline.encode_prompt(prompt, None, max_sequence_length=24)


@torch.inference_mode()
def draw(
    family: Family, text: Conditioning, size: tuple[int, int], *, sampler: Any, steps: int, guidance: float, cfg: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, H, W) in [0, 1], and the timesteps: a loop by hand around `predict`."""
    height, width = (side // family.vae.scale_factor for side in size)
    scheduler = sampler.from_config(family.scheduler_config)
    family.set_timesteps(scheduler, steps, (height, width))
    assert scheduler.timesteps.device == CPU
    channels = family.model.denoiser.latent_channels
    latents = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(7))
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    sides = [family.text(each) for each in Schedule.constant(text).texts]
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        out = family.predict([Lane(scaled, t, side, guidance) for side in sides])
        assert out.shape == (len(sides), channels, height, width)
        prediction = out[:1] if len(sides) == 1 else out[1:] + cfg * (out[:1] - out[1:])
        latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
    return (family.vae.decode(latents) / 2 + 0.5).clamp(0, 1), scheduler.timesteps


def ask(pipeline: Any, size: tuple[int, int], steps: int, guidance: float, cfg: float) -> torch.Tensor:
    """The same of the stock pipeline. FLUX reads both numbers, the others classifier-free guidance alone."""
    options: dict[str, Any] = {"guidance_scale": cfg, "negative_prompt": NEGATIVE if cfg > 1 else ""}
    name = type(pipeline).__name__
    if name == "FluxPipeline":
        options |= {"guidance_scale": guidance, "true_cfg_scale": cfg, "max_sequence_length": 24}
    elif name == "StableDiffusion3Pipeline":
        options["max_sequence_length"] = 24
    elif name.startswith("PixArt"):
        options |= {"use_resolution_binning": False, "clean_caption": False}
    return pipeline(
        PROMPT,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
        **options,
    ).images[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize(("size", "steps"), [((64, 64), 4), ((32, 56), 7)])
def test_a_loop_around_a_family_is_the_stock_pipeline(
    pairs: Mapping[str, Pair], name: str, cfg: float, size: tuple[int, int], steps: int
) -> None:
    family, pipeline = pairs[name].family, pairs[name].pipeline
    text = conditioning(pipeline, NEGATIVE if cfg > 1 else None)
    expected = ask(pipeline, size, steps, 2.5, cfg)
    got, timesteps = draw(family, text, size, sampler=family.scheduler_class, steps=steps, guidance=2.5, cfg=cfg)
    assert torch.equal(timesteps, pipeline.scheduler.timesteps.cpu())
    assert (got - expected).abs().max() <= 1 / 255
    assert expected.std() > 0.02, "an image, not a grey area that anything would equal"


def test_sd3_shifts_by_the_image_s_size_where_its_sampler_says_so(folders: Mapping[str, Path]) -> None:
    family, pipeline = opened(folders["sd3"]), stock(folders["sd3"])
    family.scheduler_config = family.scheduler_config | {"use_dynamic_shifting": True}
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(family.scheduler_config)
    text, sampler = conditioning(pipeline, NEGATIVE), FlowMatchEulerDiscreteScheduler
    listed = []
    for size in ((64, 64), (96, 88)):
        expected = ask(pipeline, size, 5, 0, 4.0)
        got, timesteps = draw(family, text, size, sampler=sampler, steps=5, guidance=0, cfg=4.0)
        assert torch.equal(timesteps, pipeline.scheduler.timesteps)
        assert (got - expected).abs().max() <= 1 / 255
        listed.append(timesteps)
    assert not torch.equal(*listed)


def test_heun_draws_sd3_as_the_stock_pipeline_does(folders: Mapping[str, Path]) -> None:
    family, pipeline = opened(folders["sd3"]), stock(folders["sd3"])
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    text, sampler = conditioning(pipeline, NEGATIVE), FlowMatchHeunDiscreteScheduler
    got, timesteps = draw(family, text, (64, 64), sampler=sampler, steps=4, guidance=0, cfg=4.0)
    assert (got - ask(pipeline, (64, 64), 4, 0, 4.0)).abs().max() <= 1 / 255
    assert len(timesteps) == 7


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell"])
def test_heun_shifts_flux_as_its_own_sampler_does(pairs: Mapping[str, Pair], name: str) -> None:
    """The stock pipeline takes no Heun. With many steps both samplers walk the same line of timesteps, but for the
    end, which Heun's class shifts twice."""
    family = pairs[name].family
    for shape in ((16, 16), (64, 128)):
        euler = FlowMatchEulerDiscreteScheduler.from_config(family.scheduler_config)
        heun = FlowMatchHeunDiscreteScheduler.from_config(family.scheduler_config)
        for scheduler in (euler, heun):
            family.set_timesteps(scheduler, 1000, shape)
        assert torch.allclose(heun.timesteps[1:1000:2], euler.timesteps[1:501], atol=1)
    text = conditioning(pairs[name].pipeline, None)
    image, _ = draw(family, text, (64, 64), sampler=type(heun), steps=3, guidance=2.5, cfg=1.0)
    assert torch.isfinite(image).all()


def lanes_of(family: Family, texts: int, lengths: list[int], shape: tuple[int, int] = (12, 16)) -> list[Lane]:
    """As many lanes as `lengths` says, each with text, timestep and guidance of its own."""
    generator = torch.Generator().manual_seed(3)
    channels, width = family.model.denoiser.latent_channels, family.model.context_width

    def noise(*sizes: int) -> torch.Tensor:
        return family.place(torch.randn(*sizes, generator=generator))

    return [
        Lane(
            noise(1, channels, *shape),
            torch.tensor(timestep, dtype=dtype),
            Text(noise(length, width), noise(texts) if texts else None),
            guidance,
        )
        for length, timestep, dtype, guidance in zip(
            lengths,
            [999, 617.5, 33, 250.25],
            [torch.int64, torch.float32, torch.int64, torch.float64],
            [1.0, 3.5, 7.0, 0.0],
            strict=False,
        )
    ]


def pooled_width(family: Family) -> int:
    return int(family.denoiser.config.get("pooled_projection_dim", 0))


def alone(transformer: Any, lane: Lane, factor: int) -> torch.Tensor:
    """The stock transformer as its pipeline calls it, for one lane."""
    text = lane.text.context[None]
    latents, timestep = lane.latents, lane.timestep[None].float()
    _, channels, height, width = latents.shape
    common = {"encoder_hidden_states": text, "return_dict": False}
    name = type(transformer).__name__
    if name == "PixArtTransformer2DModel":
        resolution = {"resolution": torch.tensor([[height * factor, width * factor]]).to(latents)}
        added = resolution | {"aspect_ratio": torch.tensor([[height / width]]).to(latents)}
        told = transformer.config.sample_size == 128
        added = added if told else dict.fromkeys(added)
        return transformer(latents, timestep=timestep, added_cond_kwargs=added, **common)[0][:, :channels]
    if name == "AuraFlowTransformer2DModel":
        return transformer(latents, timestep=(timestep / 1000).to(latents), **common)[0]
    pooled = lane.text.pooled[None]
    if name == "SD3Transformer2DModel":
        return transformer(latents, timestep=timestep, pooled_projections=pooled, **common)[0]
    guided = transformer.config.guidance_embeds
    out = transformer(
        hidden_states=FluxPipeline._pack_latents(latents, 1, channels, height, width),
        timestep=timestep.to(latents.dtype) / 1000,
        guidance=torch.full([1], lane.guidance_scale) if guided else None,
        pooled_projections=pooled,
        txt_ids=torch.zeros(text.shape[1], 3).to(latents),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, CPU, latents.dtype),
        **common,
    )[0]
    return FluxPipeline._unpack_latents(out, height, width, 1)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_lanes_with_nothing_in_common_equal_each_alone(pairs: Mapping[str, Pair], name: str) -> None:
    family, transformer = pairs[name].family, pairs[name].pipeline.transformer
    lengths = [5, 1, 23, 9] if family.pads_context else [9] * 4
    assert family.pads_context == name.startswith("pixart")
    lanes = lanes_of(family, pooled_width(family), lengths)
    got = family.predict(lanes)
    assert got.shape == (4, *lanes[0].latents.shape[1:])
    for found, lane in zip(got, lanes, strict=True):
        expected = alone(transformer, lane, family.vae.scale_factor)[0]
        assert torch.allclose(found, expected, atol=1e-5, rtol=0)
        assert expected.std() > 0.1
    for index in range(4):  # no lane is answered with another's text, time or noise
        assert all(not torch.allclose(got[index], got[other], atol=1e-2) for other in range(index))


@torch.inference_mode()
def test_guidance_is_read_by_dev_alone(pairs: Mapping[str, Pair]) -> None:
    for name, reads in {"flux-dev": True, "flux-schnell": False, "sd3": False, "pixart-alpha": False}.items():
        family = pairs[name].family
        (lane,) = lanes_of(family, pooled_width(family), [4])
        one, other = family.predict([lane]), family.predict([replace(lane, guidance_scale=9.0)])
        assert torch.allclose(one, other) is not reads


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "pixart-alpha", "auraflow"])
@torch.inference_mode()
def test_half_precision_rounds_where_the_stock_pipeline_rounds(folders: Mapping[str, Path], name: str) -> None:
    """A FLUX timestep of 617.5 is 616 in bfloat16."""
    family = opened(folders[name], torch.bfloat16)
    for lane in lanes_of(family, pooled_width(family), [9, 9]):
        got = family.predict([replace(lane, latents=lane.latents.float())])
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, alone(family.denoiser, lane, family.vae.scale_factor))


@torch.inference_mode()
def test_the_place_of_auraflow_s_zeros_is_no_matter(pairs: Mapping[str, Pair]) -> None:
    """The stock tokenizer pads before the text, ours are after it."""
    family = pairs["auraflow"].family
    (lane,) = lanes_of(family, 0, [5])
    after, before = (torch.nn.functional.pad(lane.text.context, (0, 0, *sides)) for sides in ((0, 251), (251, 0)))
    one, other = (family.predict([replace(lane, text=Text(context))]) for context in (after, before))
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(one, family.predict([lane]), atol=1e-3), "they are read"


def test_packing_is_the_stock_pipeline_s_and_undone() -> None:
    latents = torch.randn(2, 8, 6, 10)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 8, 6, 10))
    assert torch.equal(unpack(pack(latents), 6, 10), latents)
    assert torch.equal(image_ids(3, 5), FluxPipeline._prepare_latent_image_ids(1, 3, 5, CPU, torch.float32))


def test_a_transformer_that_packs_otherwise_is_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    model = check_folder(folders["flux-schnell"], "flux")
    for part in model.path.iterdir():
        if part.name != "transformer":
            (tmp_path / part.name).symlink_to(part)
    config = dict(FluxTransformer2DModel.load_config(model.path / "transformer")) | {"patch_size": 2}
    FluxTransformer2DModel.from_config(config).save_pretrained(tmp_path / "transformer")
    with pytest.raises(OperatorError, match="flux can't be loaded: its transformer reads patches of 2 and 32 channels"):
        open_family(replace(model, path=tmp_path), CPU, torch.float32, DiffusionSettings())
