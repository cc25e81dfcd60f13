"""The safetensors answer: names, shapes and precision, read back as a client reads them."""

import inspect
import json
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    FluxPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load

from serve.domain.conditioning import Conditioning
from serve.encoders.export import shapes, to_safetensors
from serve.errors import InvalidRequest
from serve.settings.room import Dtype

TOKENS, WIDTH, POOLED = 5, 8, 4


def conditioning(*, pooled: bool = False, negative: bool = True, time_ids: bool = False) -> Conditioning:
    return Conditioning(
        positive=torch.randn(TOKENS, WIDTH),
        negative=torch.randn(TOKENS, WIDTH) if negative else None,
        pooled=torch.randn(POOLED) if pooled else None,
        negative_pooled=torch.randn(POOLED) if pooled and negative else None,
        time_ids=torch.tensor([1016.0, 2024.0, 0.0, 0.0, 1016.0, 2024.0]) if time_ids else None,
    )


CONTEXT, VECTOR = (1, TOKENS, WIDTH), (1, POOLED)
BOTH = {"prompt_embeds": CONTEXT, "negative_prompt_embeds": CONTEXT}
ALL = BOTH | {"pooled_prompt_embeds": VECTOR, "negative_pooled_prompt_embeds": VECTOR}
FAMILIES: list[tuple[str, dict[str, bool], dict[str, tuple[int, ...]]]] = [
    ("sd", {}, BOTH),
    ("sd", {"negative": False}, {"prompt_embeds": CONTEXT}),
    ("sdxl", {"pooled": True, "time_ids": True}, ALL | {"add_time_ids": (1, 6)}),
    ("sd3", {"pooled": True}, ALL),
    (
        "flux",
        {"pooled": True, "negative": False},
        {"prompt_embeds": CONTEXT, "pooled_prompt_embeds": VECTOR, "text_ids": (TOKENS, 3)},
    ),
    ("sdxl_refiner", {"pooled": True, "time_ids": True}, ALL | {"add_time_ids": (1, 6)}),
    ("pixart", {}, BOTH | {"prompt_attention_mask": (1, TOKENS), "negative_prompt_attention_mask": (1, TOKENS)}),
    ("auraflow", {}, BOTH | {"prompt_attention_mask": (1, TOKENS), "negative_prompt_attention_mask": (1, TOKENS)}),
    ("pixart", {"negative": False}, {"prompt_embeds": CONTEXT, "prompt_attention_mask": (1, TOKENS)}),
]


@pytest.mark.parametrize(("family", "has", "expected"), FAMILIES)
def test_the_names_and_shapes_of_each_family(
    family: str, has: dict[str, bool], expected: dict[str, tuple[int, ...]]
) -> None:
    text = conditioning(**has)
    read = load(to_safetensors(text, family, {}, "float32"))
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == expected == shapes(text, family)
    assert torch.equal(read["prompt_embeds"][0], text.positive)
    if text.negative is not None:
        assert torch.equal(read["negative_prompt_embeds"][0], text.negative)


@pytest.mark.parametrize(("family", "has", "expected"), FAMILIES)
def test_the_names_are_the_stock_pipelines_arguments(family: str, has: dict[str, bool], expected: object) -> None:
    """All but the ids, which SDXL's and FLUX's make themselves."""
    pipelines = {
        "sd": StableDiffusionPipeline,
        "sdxl": StableDiffusionXLPipeline,
        "sd3": StableDiffusion3Pipeline,
        "flux": FluxPipeline,
        "sdxl_refiner": StableDiffusionXLImg2ImgPipeline,
        "pixart": PixArtSigmaPipeline,
        "auraflow": AuraFlowPipeline,
    }
    arguments = inspect.signature(pipelines[family].__call__).parameters
    foreign = {name for name in shapes(conditioning(**has), family) if name not in arguments}
    ids = {"sdxl": {"add_time_ids"}, "sdxl_refiner": {"add_time_ids"}, "flux": {"text_ids"}}
    assert foreign == ids.get(family, set())


def test_the_refiner_has_ids_for_both_sides() -> None:
    ids = torch.tensor([64.0, 64.0, 0.0, 0.0, 6.0])
    text = replace(conditioning(), time_ids=ids, negative_time_ids=ids - 3.5)
    read = load(to_safetensors(text, "sdxl_refiner", {}, "bfloat16"))
    assert torch.equal(read["negative_add_time_ids"], ids[None] - 3.5)


@pytest.mark.parametrize("negative", [1, 9])
def test_sides_of_pixart_are_padded_to_one_length_and_masked(negative: int) -> None:
    text = replace(conditioning(), negative=torch.randn(negative, WIDTH))
    read = load(to_safetensors(text, "pixart", {}, "float16"))
    longest = max(negative, TOKENS)
    for side, length in (("prompt", TOKENS), ("negative_prompt", negative)):
        embeds, mask = read[f"{side}_embeds"], read[f"{side}_attention_mask"]
        assert embeds.shape == (1, longest, WIDTH)
        assert mask.tolist() == [[1] * length + [0] * (longest - length)]
        assert mask.dtype == torch.int64
        assert not embeds[0, length:].any()
    assert torch.equal(read["prompt_embeds"][0, :TOKENS], text.positive.half())


def test_zeros_that_fill_auraflow_s_context_are_masked() -> None:
    text = conditioning()
    text.positive[3:] = 0
    read = load(to_safetensors(text, "auraflow", {}, "float32"))
    assert read["prompt_attention_mask"].tolist() == [[1, 1, 1, 0, 0]]
    assert read["negative_prompt_attention_mask"].tolist() == [[1] * TOKENS]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_embeddings_are_in_the_precision_asked_for_and_ids_stay_exact(dtype: Dtype) -> None:
    text = conditioning(pooled=True, time_ids=True)
    read = load(to_safetensors(text, "sdxl", {}, dtype))
    for name, tensor in read.items():
        assert tensor.dtype == (torch.float32 if name == "add_time_ids" else getattr(torch, dtype))
    assert text.time_ids is not None
    assert torch.equal(read["add_time_ids"][0], text.time_ids)
    assert torch.equal(read["prompt_embeds"][0], text.positive.to(getattr(torch, dtype)))


def test_a_value_that_does_not_fit_is_refused_and_not_made_infinite() -> None:
    text = conditioning()
    text.positive[0, 0] = 1e6
    with pytest.raises(InvalidRequest, match="prompt_embeds") as refused:
        to_safetensors(text, "sd", {}, "float16")
    assert refused.value.param == "dtype"
    assert to_safetensors(text, "sd", {}, "bfloat16")


def test_the_metadata_is_in_the_file_s_header() -> None:
    cut = json.dumps([{"text": 'ein "großer" Kreis ☃\n'}])
    data = to_safetensors(conditioning(), "sd", {"model": "shapes", "truncated": cut}, "float32")
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    assert header["__metadata__"] == {"model": "shapes", "truncated": cut}
