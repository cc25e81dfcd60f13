"""The whole text side against the stock pipelines: plan, batched encoding, codec, composition = `encode_prompt`."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    FluxPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support.text_models import (
    auraflow_folder,
    flux_folder,
    pixart_folder,
    sd3_folder,
    sd_folder,
    sdxl_folder,
    sdxl_refiner_folder,
)
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaTokenizerFast,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5EncoderModel,
)

from serve.domain.conditioning import Conditioning
from serve.domain.text import EncodeUnit, LongPrompt, TextRequest, Weighting
from serve.encoders.codec import pack
from serve.encoders.compose import compose
from serve.encoders.export import conditioning_at
from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import Registry, register
from serve.models.folder import SHIPPED, ModelFolder, check_folder
from serve.prompts.families import UNPADDED
from serve.prompts.plan import Planner, PromptPlan
from serve.settings.tree import Settings

FOLDERS: Mapping[str, Callable[[Path], Path]] = {
    "shapes": lambda _: SHIPPED,
    "sd": sd_folder,
    "sdxl": sdxl_folder,
    "sdxl-encoded-empty": lambda path: sdxl_folder(path, seed=1, zero_empty_negative=False),
    "sd3": sd3_folder,
    "sd3-without-t5": lambda path: sd3_folder(path, with_t5=False),
    "flux": flux_folder,
    "sdxl_refiner": sdxl_refiner_folder,
    "pixart-sigma": pixart_folder,
    "pixart-alpha": lambda path: pixart_folder(path, sigma=False),
    "auraflow": auraflow_folder,
}
TEXTS = {
    "plain": ("a red circle on a blue background", "blurry, a square"),
    "unguided": ("a green ring", None),
    "empty-negative": ("a red circle", ""),
    "empty": ("", "red"),
    "capitals": ("  A RED Circle\n", "Ugly, İstanbul ΟΔΟΣ "),
    "odd": ("!!! Großes 緑の星 \U0001f600 <|endoftext|> red </s> circle!", " "),
    "cut": ("a tiny purple star, " * 120, "low quality " * 50),
}
REQUEST = TextRequest(model="m", prompt="", width=96, height=64, long_prompt=LongPrompt.HEAD)
"""The stock pipelines read the head of a long text."""
ATOL = 1e-5


@dataclass(frozen=True, slots=True)
class House:
    """All models, served together: what they share is one tower."""

    models: Mapping[str, ModelFolder]
    registry: Registry
    planners: Mapping[str, Planner]
    towers: Mapping[str, TextTower]

    def encode(self, units: Iterable[EncodeUnit]) -> dict[str, bytes]:
        """One forward for all units of one encoder and one length, strangers beside each other."""
        wanted = tuple(dict.fromkeys(units))
        packed: dict[str, bytes] = {}
        for encoder, length in {(unit.encoder, len(unit.token_ids)) for unit in wanted}:
            tower = self.towers[encoder]
            batch = [unit for unit in wanted if (unit.encoder, len(unit.token_ids)) == (encoder, length)]
            rows = [Row.of(unit, tower.outputs) for unit in batch]
            for unit, found in zip(batch, tower.encode(rows), strict=True):
                packed[unit.key] = pack(found[unit.output])
        return packed

    def conditioning(self, name: str, request: TextRequest, beside: Iterable[EncodeUnit] = ()) -> Conditioning:
        """`beside` are units of other requests; those that can share a forward with ours do."""
        plan = self.planners[name].plan(request)
        shared = {(unit.encoder, len(unit.token_ids)) for unit in plan.units}
        strangers = [unit for unit in beside if (unit.encoder, len(unit.token_ids)) in shared]
        assert not beside or strangers or self.models[name].family in UNPADDED
        return composed(plan, self.encode((*strangers, *plan.units)))


def composed(plan: PromptPlan, embeddings: Mapping[str, bytes]) -> Conditioning:
    """What the first step reads, and here every other."""
    return conditioning_at(compose(plan, embeddings), 0)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    root = tmp_path_factory.mktemp("house")
    models = {name: check_folder(make(root / name), name, text_only=True) for name, make in FOLDERS.items()}
    registry = register(list(models.values()), Settings(data_dir=root / "data"))
    planners = {name: Planner(model, registry.sources(name)) for name, model in models.items()}
    towers = {encoder.fingerprint: TextTower.load(encoder, "cpu") for encoder in registry.encoders}
    return House(models, registry, planners, towers)


@pytest.fixture(scope="module")
def strangers(house: House) -> tuple[EncodeUnit, ...]:
    """Rows of other requests, of every model."""
    texts = [("two green boxes", "a blurry ring"), ("one", "x " * 90)]
    return tuple(
        unit
        for planner in house.planners.values()
        for prompt, negative in texts
        for unit in planner.plan(replace(REQUEST, prompt=prompt, negative_prompt=negative)).units
    )


class Stock:
    """The stock pipeline of one model folder, without what draws; `encode` is its `encode_prompt`."""

    def __init__(self, model: ModelFolder) -> None:
        self.family = model.family
        self.zero_empty = model.zero_empty_negative
        self.width = model.context_width
        parts: dict[str, Any] = {}
        self.longest = next((part.longest_row for part in model.text), None)
        roles = {"sd": 1, "sd3": 3, "pixart": 1, "auraflow": 1}.get(self.family, 2)
        for role in ("text_encoder", "text_encoder_2", "text_encoder_3")[:roles]:
            part = next((part for part in model.text if part.role == role), None)
            parts |= {role: None, role.replace("text_encoder", "tokenizer"): None}
            if part is not None:
                encoder = CLIPTextModel if part.projection is None else CLIPTextModelWithProjection
                encoder, tokenizer = {
                    "clip": (encoder, CLIPTokenizer),
                    "t5": (T5EncoderModel, T5TokenizerFast),
                    "umt5": (UMT5EncoderModel, LlamaTokenizerFast),
                }[part.kind]
                parts[role] = encoder.from_pretrained(part.weights, dtype=torch.float32).eval()
                if encoder is CLIPTextModel:
                    # diffusers 0.42 looks for the final norm where transformers 4 had it. Set past nn.Module, which
                    # would take it for a submodule.
                    object.__setattr__(parts[role], "text_model", parts[role])
                parts[role.replace("text_encoder", "tokenizer")] = tokenizer.from_pretrained(part.tokenizer)
        self.parts = parts
        self.pipeline = self._build(parts)

    def _build(self, parts: Mapping[str, Any]) -> Any:
        rest = {"scheduler": None, "vae": None}
        if self.family == "sd":
            unused = {"unet": None, "safety_checker": None, "feature_extractor": None}
            return StableDiffusionPipeline(**parts, **rest, **unused, requires_safety_checker=False)
        if self.family == "sdxl":
            zero = {"force_zeros_for_empty_prompt": self.zero_empty, "add_watermarker": False}
            return StableDiffusionXLPipeline(**parts, **rest, unet=_unet(parts["text_encoder_2"], 6), **zero)
        if self.family == "sdxl_refiner":
            told = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False, "add_watermarker": False}
            return StableDiffusionXLImg2ImgPipeline(**parts, **rest, unet=_unet(parts["text_encoder_2"], 5), **told)
        if self.family == "auraflow":
            return AuraFlowPipeline(**parts, **rest, transformer=None)
        if self.family == "pixart":
            pipeline = PixArtAlphaPipeline if self.longest == 120 else PixArtSigmaPipeline
            return pipeline(**parts, **rest, transformer=None)
        if self.family == "flux":
            return FluxPipeline(**parts, **rest, transformer=None)
        narrow = {"num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "caption_projection_dim": 8}
        transformer = SD3Transformer2DModel(sample_size=4, joint_attention_dim=self.width, **narrow)
        return StableDiffusion3Pipeline(**parts, **rest, transformer=transformer)

    @torch.inference_mode()
    def encode(self, request: TextRequest) -> Conditioning:
        pipeline, guided = self.pipeline, request.negative_prompt is not None
        negative = request.negative_prompt or None
        options: dict[str, Any] = {"device": "cpu", "num_images_per_prompt": 1}
        if self.family in UNPADDED:
            return self._masked(request, options)
        if self.family != "flux":
            options |= {"do_classifier_free_guidance": guided, "clip_skip": request.clip_skip}
        if request.max_sequence_length is not None:
            options["max_sequence_length"] = request.max_sequence_length
        if self.family == "sd":
            found = pipeline.encode_prompt(request.prompt, negative_prompt=negative, **options)
            return _alone(*found)
        if self.family.startswith("sdxl"):
            found = pipeline.encode_prompt(request.prompt, negative_prompt=negative, **options)
            size = (request.height, request.width)
            width = found[2].shape[1]
            if self.family == "sdxl":
                return _alone(*found, pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, width))
            scores = _default(pipeline, "aesthetic_score"), _default(pipeline, "negative_aesthetic_score")
            told = (size, (0, 0), size, *scores, size, (0, 0), size, torch.float32, width)
            ids, negative_ids = pipeline._get_add_time_ids(*told)
            return _alone(*found, ids, negative_ids if guided else None)
        if self.family == "sd3":
            if not request.use_t5:
                pipeline = self._build(self.parts | {"text_encoder_3": None, "tokenizer_3": None})
            prompts = (request.prompt, None, None)
            return _alone(*pipeline.encode_prompt(*prompts, negative_prompt=negative, **options))
        positive, pooled, _ = pipeline.encode_prompt(request.prompt, None, **options)
        if not guided:
            return _alone(positive, None, pooled)
        minus, minus_pooled, _ = pipeline.encode_prompt(request.negative_prompt, None, **options)
        return _alone(positive, minus, pooled, minus_pooled)

    def _masked(self, request: TextRequest, options: dict[str, Any]) -> Conditioning:
        """What PixArt's transformer is let see of the text, which is padded to a length that ours never has.

        AuraFlow's reads zeros in the padding's place; before the text, but it gives text no positions.
        """
        guided = request.negative_prompt is not None
        length = request.max_sequence_length or _default(self.pipeline, "max_sequence_length")
        text, mask, minus, minus_mask = self.pipeline.encode_prompt(
            request.prompt,
            do_classifier_free_guidance=guided,
            negative_prompt=request.negative_prompt or "",
            max_sequence_length=length,
            **options,
        )
        assert text.shape[1] == length
        # AuraFlow's pipeline spreads its mask over the width.
        sides = [
            None if side is None else side[0][told.view(length, -1)[:, 0] == 1]
            for side, told in ((text, mask), (minus, minus_mask))
        ]
        if self.family == "auraflow":
            sides = [None if side is None else nn.functional.pad(side, (0, 0, 0, length - len(side))) for side in sides]
        return Conditioning(*sides)


def _default(pipeline: Any, argument: str) -> Any:
    return inspect.signature(pipeline.__call__).parameters[argument].default


def _alone(*tensors: torch.Tensor | None) -> Conditioning:
    return Conditioning(*(None if tensor is None else tensor[0] for tensor in tensors))


def _unet(second: CLIPTextModelWithProjection, time_ids: int) -> UNet2DConditionModel:
    """SDXL's pipeline asks its U-Net how many time ids it takes."""
    return UNet2DConditionModel(
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=1,
        attention_head_dim=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=time_ids * 4 + second.config.projection_dim,
    )


@pytest.fixture(scope="module")
def stocks(house: House) -> Mapping[str, Stock]:
    return {name: Stock(model) for name, model in house.models.items()}


def assert_equal(got: Conditioning, expected: Conditioning) -> None:
    for name in ("positive", "negative", "pooled", "negative_pooled", "time_ids", "negative_time_ids"):
        ours, theirs = getattr(got, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype is torch.float32
            assert ours.shape == theirs.shape, name
            assert torch.allclose(ours, theirs, atol=ATOL, rtol=0), (name, (ours - theirs).abs().max())


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize(("prompt", "negative"), TEXTS.values(), ids=TEXTS)
def test_conditioning_equals_the_stock_pipeline(
    house: House, stocks: Mapping[str, Stock], strangers, name: str, prompt: str, negative: str | None
) -> None:
    request = replace(REQUEST, prompt=prompt, negative_prompt=negative)
    assert_equal(house.conditioning(name, request, strangers), stocks[name].encode(request))


@pytest.mark.parametrize(
    ("name", "clip_skip"),
    [
        *[("sd", 0), ("sd", 1), ("sd", 2), ("sdxl", 0), ("sdxl", 1), ("sdxl-encoded-empty", 1), ("sd3", 0), ("sd3", 1)],
        *[("sdxl_refiner", 0), ("sdxl_refiner", 1)],
    ],
)
@pytest.mark.parametrize("negative", [None, "", "a square"])
def test_clip_skip_equals_the_stock_pipeline(
    house: House, stocks: Mapping[str, Stock], strangers, name: str, clip_skip: int, negative: str | None
) -> None:
    """From the default to the last layer that is allowed."""
    request = replace(REQUEST, prompt="a tiny red circle", negative_prompt=negative, clip_skip=clip_skip)
    got = house.conditioning(name, request, strangers)
    assert_equal(got, stocks[name].encode(request))
    plain = house.conditioning(name, replace(request, clip_skip=None), strangers)
    assert torch.equal(got.positive, plain.positive) == (clip_skip == 0)


@pytest.mark.parametrize(
    ("name", "length"),
    [
        *((name, length) for name in ("sd3", "sd3-without-t5", "flux") for length in (1, 9, 77, 512)),
        *((name, length) for name in ("pixart-sigma", "pixart-alpha", "auraflow") for length in (1, 9, 77, 120)),
    ],
)
def test_t5_lengths_equal_the_stock_pipeline(house: House, stocks: Mapping[str, Stock], name: str, length: int) -> None:
    for prompt, negative in (TEXTS["plain"], TEXTS["cut"]):
        request = replace(REQUEST, prompt=prompt, negative_prompt=negative, max_sequence_length=length)
        assert_equal(house.conditioning(name, request), stocks[name].encode(request))


@pytest.mark.parametrize("negative", [None, "a square"])
def test_sd3_with_its_t5_left_unread_equals_the_stock_pipeline_without_one(
    house: House, stocks: Mapping[str, Stock], strangers, negative: str | None
) -> None:
    request = replace(REQUEST, prompt="a red circle", negative_prompt=negative, use_t5=False)
    got = house.conditioning("sd3", request, strangers)
    assert_equal(got, stocks["sd3"].encode(request))
    assert_equal(got, house.conditioning("sd3-without-t5", replace(request, use_t5=True)))


def test_families_share_the_encoders_that_they_share(house: House) -> None:
    """CLIP-L of sd, sdxl, sd3 and flux, OpenCLIP of sdxl, its refiner and sd3, T5 of sd3, flux and PixArt are one tower
    each."""
    found = {encoder.part.kind: [] for encoder in house.registry.encoders}
    for encoder in house.registry.encoders:
        found[encoder.part.kind].append(set(encoder.models))
    assert found["umt5"] == [{"auraflow"}]
    assert found["t5"] == [{"sd3", "flux", "pixart-sigma", "pixart-alpha"}]
    assert {"sd", "sdxl", "sd3", "sd3-without-t5", "flux"} in found["clip"]
    assert {"sdxl", "sdxl_refiner", "sd3", "sd3-without-t5"} in found["clip"]


WORDS = ["red", "(blue:1.4)", "[circle]", "a", "star,", "緑", "!", "on a (white background:0.6)"]


@st.composite
def asked(draw: st.DrawFn) -> tuple[str, TextRequest]:
    name = draw(st.sampled_from(sorted(FOLDERS)))
    text = st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join)
    request = replace(REQUEST, prompt=draw(text), negative_prompt=draw(st.none() | text))
    if name.startswith(("sd3", "flux", "pixart", "auraflow")):
        request = replace(request, max_sequence_length=draw(st.sampled_from([16, 77])))
    if name == "sd3":
        request = replace(request, use_t5=draw(st.booleans()))
    if not name.startswith(("flux", "pixart", "auraflow")):
        request = replace(request, clip_skip=draw(st.sampled_from([None, 0, 1])))
    return name, request


@settings(max_examples=25, deadline=None)
@given(requests=st.lists(asked(), min_size=1, max_size=6))
def test_any_mix_batched_together_equals_each_alone(house: House, requests: list[tuple[str, TextRequest]]) -> None:
    plans = [house.planners[name].plan(request) for name, request in requests]
    together = house.encode(unit for plan in plans for unit in plan.units)
    for plan in plans:
        alone: dict[str, bytes] = {}
        for unit in plan.units:
            alone |= house.encode([unit])
        assert_equal(composed(plan, together), composed(plan, alone))


@pytest.mark.parametrize("rule", Weighting)
@pytest.mark.parametrize("name", FOLDERS)
def test_weights_are_arithmetic_on_the_same_units(house: House, name: str, rule: Weighting) -> None:
    """Another weight needs no forward, weight 1 changes no bit, and vectors stay as they are."""
    request = replace(REQUEST, prompt="a red circle", negative_prompt="a star", weighting=rule)
    plan = house.planners[name].plan(request)
    plain = composed(plan, house.encode(plan.units))
    of_one = house.planners[name].plan(replace(request, prompt="a (red:1) ([circle])"))
    assert of_one.units == plan.units
    assert_same(composed(of_one, house.encode(of_one.units)), plain)
    half = house.planners[name].plan(replace(request, prompt="a (red:0.5) circle"))
    embeddings = house.encode(half.units)
    assert len(half.units) > len(plan.units) if rule is Weighting.COMPEL else half.units == plan.units
    found = [composed(half, embeddings)]
    for weight in (0.0, 1.5, 2.0):
        other = house.planners[name].plan(replace(request, prompt=f"a (red:{weight}) circle"))
        assert other.units == half.units
        found.append(composed(other, embeddings))
    for weighted in found:
        assert not torch.allclose(weighted.positive, plain.positive, atol=1e-3)
        assert_equal(replace(weighted, positive=plain.positive), plain)
    assert not any(torch.allclose(one.positive, other.positive, atol=1e-3) for one, other in pairwise(found))


def assert_same(got: Conditioning, expected: Conditioning) -> None:
    """To the bit."""
    assert_equal(got, expected)
    assert torch.equal(got.positive, expected.positive)
