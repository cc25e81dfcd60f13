"""The shapes, the arithmetic of a row, and the texts."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from serve.bench.shapes import SHAPES, EncoderShape, model_of
from serve.bench.texts import caption_rows, prompt, random_row
from serve.bench.weights import write_model
from serve.models import resolve
from serve.prompts.tokenizers import PromptTokenizer
from serve.settings.pools import ModelSettings

CLIP = EncoderShape(
    name="tiny",
    kind="clip",
    width=64,
    layers=3,
    heads=4,
    head_width=16,
    feed_forward=96,
    vocab_size=1300,
)
PROJECTED = EncoderShape(
    name="tiny-projected",
    kind="clip",
    width=64,
    layers=2,
    heads=2,
    head_width=32,
    feed_forward=128,
    vocab_size=1300,
    projection=48,
)
T5 = EncoderShape(
    name="tiny-t5",
    kind="t5",
    width=64,
    layers=2,
    heads=3,
    head_width=16,
    feed_forward=80,
    vocab_size=1300,
    row_tokens=32,
)


@pytest.mark.parametrize("shape", [CLIP, PROJECTED, T5], ids=lambda shape: shape.name)
def test_operations_of_a_row_are_those_that_torch_counts(shape: EncoderShape) -> None:
    ids = torch.tensor([random_row(shape, 0, 0)])
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        _eager(shape)(input_ids=ids)
    assert shape.flop_per_row == counter.get_total_flops()


def _eager(shape: EncoderShape) -> torch.nn.Module:
    """torch does not count what a fused attention on a CPU computes."""
    if shape.kind == "t5":
        return T5EncoderModel._from_config(T5Config(**shape.config), attn_implementation="eager").eval()
    cls = CLIPTextModel if shape.projection is None else CLIPTextModelWithProjection
    return cls._from_config(CLIPTextConfig(**shape.config), attn_implementation="eager").eval()


PARAMETERS: Mapping[str, float] = {
    # Of the published checkpoints' text encoders, with their embeddings.
    "clip-l": 123.1e6,
    "openclip-h": 353.0e6,
    "openclip-bigg": 694.7e6,
    "t5-small": 35.3e6,
    "t5-base": 109.6e6,
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_have_the_published_encoders_sizes(name: str) -> None:
    shape = SHAPES[name]
    with torch.device("meta"):
        model = _eager(shape)
    assert sum(each.numel() for each in model.parameters()) == pytest.approx(PARAMETERS[name], rel=0.005)


@pytest.mark.parametrize("shape", [CLIP, T5], ids=lambda shape: shape.name)
def test_rows_are_whole_different_and_the_seeds(shape: EncoderShape) -> None:
    rows = [random_row(shape, 0, index) for index in range(100)]
    begin, end, _ = shape.special_ids
    assert rows == [random_row(shape, 0, index) for index in range(100)]
    assert len(set(rows)) == 100
    assert {len(row) for row in rows} == {shape.row_tokens}
    assert all(row[: len(begin)] == begin and row.index(end) == len(row) - 1 for row in rows)
    assert set(rows).isdisjoint(random_row(shape, 1, index) for index in range(100))


@pytest.mark.parametrize("shape", [CLIP, T5], ids=lambda shape: shape.name)
def test_captions_are_rows_that_end_once_and_are_padded(shape: EncoderShape) -> None:
    begin, end, pad = shape.special_ids
    for row in caption_rows(shape, 8):
        assert len(row) == shape.row_tokens
        assert row[: len(begin)] == begin
        assert set(row[row.index(end) + 1 :]) <= {pad}


def test_prompts_differ_by_number_and_by_seed() -> None:
    prompts = {prompt(seed, index) for seed in range(20) for index in range(500)}
    assert len(prompts) == 10_000


def test_a_model_folder_is_one_that_the_product_serves_text_of(tmp_path: Path) -> None:
    write_model([CLIP], 0, tmp_path / "model")
    found = resolve(ModelSettings(source=str(tmp_path / "model")), tmp_path, text_only=True)
    assert [(part.kind, part.width, part.layers) for part in found.text] == [("clip", 64, 3)]


def test_a_t5_is_served_in_a_folder_like_flux(tmp_path: Path) -> None:
    """Planned by the product from that folder: a row of each encoder, and no word that the T5's tokenizer lacks."""
    write_model([CLIP, T5], 0, tmp_path / "model")
    found = resolve(ModelSettings(source=str(tmp_path / "model")), tmp_path, text_only=True)
    assert found.family == "flux"
    assert [(part.kind, part.width, part.vocab_size) for part in found.text] == [("clip", 64, 1300), ("t5", 64, 1300)]
    tokenizer = PromptTokenizer(found.text[1])
    ids = tokenizer.tokenize("a red fox at dawn").ids
    assert len(set(ids)) > 1
    assert tokenizer.unknown not in ids
    assert max(ids) < T5.vocab_size


def test_what_a_server_is_measured_with() -> None:
    assert [shape.name for shape in model_of(SHAPES["clip-l"])] == ["clip-l"]
    assert [shape.name for shape in model_of(SHAPES["t5-small"])] == ["clip-l", "t5-small"]
    assert model_of(SHAPES["openclip-bigg"]) == ()
