"""What a tower refuses to load: by the tensor's name, or by the setting's."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from serve.encoders.forward import TextTower
from serve.encoders.registry import Encoder
from serve.errors import OperatorError
from serve.settings.pools import EncoderSettings

Weights = dict[str, torch.Tensor]


def spoiled(encoder: Encoder, path: Path, change: Callable[[Weights], object]) -> Encoder:
    """The encoder with its weights file rewritten, as if someone had done so after the registry's check."""
    part = encoder.part
    path.mkdir()
    (path / "config.json").write_text((part.weights / "config.json").read_text())
    weights = load_file(part.weights / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    moved = replace(part, weights=path)
    return replace(encoder, part=moved, projections=tuple((name, moved) for name, _ in encoder.projections))


def named(weights: Weights, end: str) -> str:
    return next(name for name in weights if name.endswith(end))


@pytest.mark.parametrize(
    ("kind", "change", "fault"),
    [
        ("clip", lambda w: w.pop(named(w, "2.mlp.fc1.weight")), r"lack encoder.layers.2.mlp.fc1.weight$"),
        ("t5", lambda w: w.pop(named(w, "1.layer.1.DenseReluDense.wo.weight")), r"lack encoder.block.1.*wo.weight$"),
        ("t5", lambda w: w.pop("shared.weight"), r"lack .*(shared|embed_tokens).weight"),
        ("openclip", lambda w: w.pop("text_projection.weight"), r"lack text_projection.weight$"),
        (
            "clip",
            lambda w: w.update({"encoder.layers.3.mlp.fc1.bias": torch.zeros(56), "zzz": torch.zeros(1)}),
            r"explain the tensor encoder.layers.3.mlp.fc1.bias and 1 more$",
        ),
        (
            "clip",
            lambda w: w.update({named(w, "0.mlp.fc1.bias"): torch.zeros(57)}),
            r"shape of encoder.layers.0.mlp.fc1.bias$",
        ),
    ],
)
def test_weights_are_refused_by_the_tensors_name(
    encoders: Mapping[str, Encoder], tmp_path: Path, kind: str, change: Callable[[Weights], object], fault: str
) -> None:
    with pytest.raises(OperatorError, match=f"model.source: {tmp_path}.*{fault}") as raised:
        TextTower.load(spoiled(encoders[kind], tmp_path / "part", change), "cpu")
    assert raised.value.param == "model.source"


def test_a_constant_of_old_checkpoints_and_a_projection_that_nobody_reads_are_no_fault(
    encoders: Mapping[str, Encoder], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    encoder = replace(encoders["clip-projected"], projections=(), outputs=("hidden",))

    def age(weights: Weights) -> None:
        weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    before = transformers_logging.get_verbosity()
    assert TextTower.load(spoiled(encoder, tmp_path / "part", age), "cpu").outputs == ("hidden",)
    assert transformers_logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")


def test_a_cut_file_is_refused(encoders: Mapping[str, Encoder], tmp_path: Path) -> None:
    encoder = spoiled(encoders["clip"], tmp_path / "part", lambda _: None)
    file = tmp_path / "part" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OperatorError, match=r"model.source: .*part.model\.safetensors is cut off: \d+ bytes"):
        TextTower.load(encoder, "cpu")


@pytest.mark.parametrize("spoil", ["trunk", "projection"])
def test_the_setting_that_names_the_model_is_said(encoders: Mapping[str, Encoder], tmp_path: Path, spoil: str) -> None:
    """The projection may come from another model than the trunk."""
    whole = encoders["clip-projected"]
    lost = "text_projection.weight" if spoil == "projection" else "final_layer_norm.bias"
    broken = spoiled(whole, tmp_path / "part", lambda weights: weights.pop(named(weights, lost))).part
    broken = replace(broken, setting="text_models.2")
    spare = tuple((name, broken) for name, _ in whole.projections)
    encoder = replace(whole, part=broken) if spoil == "trunk" else replace(whole, projections=spare)
    with pytest.raises(OperatorError, match=rf"^text_models.2.source: .*{lost}") as raised:
        TextTower.load(encoder, "cpu")
    assert raised.value.param == "text_models.2.source"


def test_a_precision_that_is_not_there_is_refused_where_it_is_set(
    encoders: Mapping[str, Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda _: False)
    plain = replace(encoders["t5"], settings=EncoderSettings(dtype="bfloat16"))
    for encoder, setting in (
        (plain, "encoder.dtype"),
        (replace(plain, overrides=(("dtype", "encoders.t5-xxl"),)), "encoders.t5-xxl.dtype"),
    ):
        with pytest.raises(OperatorError, match=f"^{setting}: this GPU has no bfloat16") as raised:
            TextTower.load(encoder, "cuda")
        assert raised.value.param == setting


def test_an_output_that_the_weights_can_not_give_is_refused_at_load(encoders: Mapping[str, Encoder]) -> None:
    with pytest.raises(ValueError, match="pooled"):
        TextTower.load(replace(encoders["t5"], outputs=("pooled",)), "cpu")
