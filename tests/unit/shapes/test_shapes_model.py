"""The shipped weights: size, format, conventions, and whether they draw what they are told."""

import json
from collections.abc import Iterator

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from transformers import CLIPTokenizer

from serve.shapes import WEIGHTS
from serve.shapes.evaluate import Model, judge_prompts

SIZE_LIMIT = 12_000_000


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The shipped model on one thread: threads of a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Model(WEIGHTS)
    torch.set_num_threads(threads)


def test_the_folder_is_small_and_holds_safetensors_only() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= SIZE_LIMIT
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}
    assert sum(path.suffix == ".safetensors" for path in files) == 3


def test_the_pipeline_is_the_stock_one() -> None:
    index = json.loads((WEIGHTS / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"]


def test_the_scheduler_is_as_documented() -> None:
    config = DPMSolverMultistepScheduler.from_pretrained(WEIGHTS / "scheduler").config
    assert config.prediction_type == "v_prediction"
    assert config.timestep_spacing == "trailing"


def test_rows_are_clips(tokenizer: CLIPTokenizer) -> None:
    row = tokenizer("a red circle", padding="max_length", truncation=True).input_ids
    assert tokenizer.model_max_length == len(row) == 77
    assert tokenizer.bos_token == "<|startoftext|>"
    assert tokenizer.eos_token == tokenizer.pad_token == tokenizer.unk_token == "<|endoftext|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert row[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(row[1:4]) == ["a</w>", "red</w>", "circle</w>"]
    assert set(row[4:]) == {tokenizer.eos_token_id}


def test_case_and_spaces_do_not_matter_and_long_text_is_cut(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer("A  Red\nCIRCLE").input_ids == tokenizer("a red circle").input_ids
    long = tokenizer("red " * 200, truncation=True, padding="max_length").input_ids
    assert len(long) == 77
    assert long[-1] == tokenizer.eos_token_id


def test_any_text_has_tokens_and_comes_back(tokenizer: CLIPTokenizer) -> None:
    for text in ("zebra", "naïve café", "日本語", "🙂", "4k, (best quality:1.2)"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_every_colour_and_shape_is_one_token(tokenizer: CLIPTokenizer) -> None:
    from serve.shapes.draw import COLOR_NAMES, SHAPES

    for word in (*COLOR_NAMES, *SHAPES):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1


def test_it_draws_held_out_prompts(model: Model) -> None:
    one = judge_prompts(model, 24, two=False)
    assert sum(outcome.verdict.ok for outcome in one) >= 22
    two = judge_prompts(model, 8, two=True)
    assert sum(outcome.verdict.ok for outcome in two) >= 5


def test_a_seed_repeats_and_another_differs(model: Model) -> None:
    first, again, other = (model.generate(["a red ring on white"], first_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.from_numpy(first), torch.from_numpy(again))
    assert abs(first - other).max() > 0.05
