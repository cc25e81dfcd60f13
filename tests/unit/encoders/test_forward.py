import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from serve.domain import EncodeUnit
from serve.encoders.codec import pack
from serve.encoders.compose import compose
from serve.encoders.forward import TextTower
from serve.errors import OperatorError
from serve.models import SHIPPED


def test_batched_equals_alone(tower: TextTower, units: list[EncodeUnit]) -> None:
    together = tower.encode(units[:32])
    for unit, row in zip(units, together, strict=False):
        (alone,) = tower.encode([unit])
        assert row.shape[0] == 77
        assert torch.allclose(row, alone, atol=1e-5, rtol=0)


def test_equal_units_are_one_row(tower: TextTower, units: list[EncodeUnit]) -> None:
    forwards, rows = tower.forwards, tower.rows
    first, second, again = tower.encode([units[0], units[1], units[0]])
    assert (tower.forwards - forwards, tower.rows - rows) == (1, 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_nothing_is_no_forward(tower: TextTower) -> None:
    forwards = tower.forwards
    assert tower.encode([]) == []
    assert tower.forwards == forwards


def test_unknown_output_is_an_error(tower: TextTower, units: list[EncodeUnit]) -> None:
    with pytest.raises(ValueError, match="pooled"):
        tower.encode([EncodeUnit(units[0].encoder, units[0].token_ids, "pooled")])


def test_conditioning_equals_the_stock_pipeline(tower: TextTower, plan) -> None:
    stock = StableDiffusionPipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    prompt, negative = "a red circle on a blue background", "a star"
    with torch.inference_mode():
        expected = stock.encode_prompt(prompt, "cpu", 1, True, negative_prompt=negative)
    ours = plan(prompt, negative)
    embeddings = {unit.key: pack(row) for unit, row in zip(ours.units, tower.encode(ours.units), strict=True)}
    conditioning = compose(ours, embeddings)
    assert torch.allclose(conditioning.positive, expected[0][0], atol=1e-5, rtol=0)
    assert torch.allclose(conditioning.negative, expected[1][0], atol=1e-5, rtol=0)


def test_dtype_is_the_asked_one(units: list[EncodeUnit]) -> None:
    half = TextTower.load(SHIPPED, "cpu", "bfloat16")
    assert half.encode(units[:1])[0].dtype is torch.bfloat16
    assert half.fingerprint != TextTower.load(SHIPPED, "cpu", "float32").fingerprint


def test_missing_weights_are_refused_not_invented(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED / "text_encoder", tmp_path / "text_encoder")
    file = tmp_path / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in weights if name.endswith("mlp.fc1.weight")))
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(OperatorError, match=r"model.source: .*mlp.fc1.weight"):
        TextTower.load(tmp_path, "cpu", "float32")
