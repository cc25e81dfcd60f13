"""One encoder per weights, whichever models have it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.text_models import flux_folder, sd3_folder, sd_folder, sdxl_folder

from serve.encoders.registry import Registry, register
from serve.encoders.unit import projection_id
from serve.errors import OperatorError
from serve.models import ModelFolder, resolve
from serve.settings.pools import ModelSettings
from serve.settings.tree import Settings

CLIP, OPEN, T5 = "clip-32x3", "clip-48x2", "t5-96x2"


def model(folder: Path) -> ModelFolder:
    return resolve(ModelSettings(source=str(folder)), Path("unused"), text_only=True)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFolder, ...]:
    folder = tmp_path_factory.mktemp("families")
    made = {"sd": sd_folder, "sdxl": sdxl_folder, "sd3": sd3_folder, "flux": flux_folder}
    return tuple(model(make(folder / name)) for name, make in made.items())


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def registered(data_dir: Path, *models: ModelFolder, **options: Any) -> Registry:
    return register(models, Settings.model_validate({"data_dir": data_dir, **options}))


def refusal(data_dir: Path, *models: ModelFolder, param: str, **options: Any) -> str:
    with pytest.raises(OperatorError) as raised:
        registered(data_dir, *models, **options)
    assert raised.value.param == param
    assert raised.value.message.startswith(f"{param}: ")
    return raised.value.message


def test_nine_parts_of_four_models_are_three_encoders(families: tuple[ModelFolder, ...], data_dir: Path) -> None:
    registry = registered(data_dir, *families)
    clip, opened, t5 = registry.encoders
    assert (clip.name, opened.name, t5.name) == (CLIP, OPEN, T5)
    assert clip.models == ("sd", "sdxl", "sd3", "flux")
    assert opened.models == ("sdxl", "sd3")
    assert t5.models == ("sd3", "flux")
    _, sdxl, sd3, _ = families
    (crown,) = clip.projections
    assert crown == (projection_id(sd3.text[0], "float32"), sd3.text[0]), "only SD 3 has CLIP-L's projection"
    assert clip.outputs == ("hidden", "pooled", f"projected:{crown[0]}", "skip:1")
    assert opened.outputs == (f"projected:{opened.projections[0][0]}", "skip:1")
    assert opened.part == sdxl.text[1]
    assert t5.outputs == ("hidden",)
    assert t5.projections == ()
    assert registry.named(T5) is t5
    with pytest.raises(KeyError):
        registry.named("clip-l")


def test_what_a_planner_gets(families: tuple[ModelFolder, ...], data_dir: Path) -> None:
    registry = registered(data_dir, *families)
    clip, opened, t5 = registry.encoders
    for each in families:
        sources = registry.sources(each.name)
        assert [(role, source.part) for role, source in sources.items()] == [(part.role, part) for part in each.text]
    sd3 = registry.sources("sd3")
    assert [source.fingerprint for source in sd3.values()] == [clip.fingerprint, opened.fingerprint, t5.fingerprint]
    assert [source.name for source in sd3.values()] == [CLIP, OPEN, T5]
    assert [source.projection for source in sd3.values()] == [clip.projections[0][0], opened.projections[0][0], None]
    sdxl = registry.sources("sdxl")
    assert sdxl["text_encoder"].projection is None, "its own CLIP-L has none, though the encoder does"
    with pytest.raises(KeyError):
        registry.sources("nobody")


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_order_of_the_models_changes_no_unit(
    families: tuple[ModelFolder, ...], data_dir: Path, data: st.DataObject
) -> None:
    chosen = data.draw(st.permutations(families).flatmap(lambda all_: st.integers(1, 4).map(lambda n: all_[:n])))
    got = registered(data_dir, *chosen)
    ordered = registered(data_dir, *(each for each in families if each in chosen))
    assert {(each.name, each.fingerprint, each.outputs) for each in got.encoders} == {
        (each.name, each.fingerprint, each.outputs) for each in ordered.encoders
    }
    whole = registered(data_dir, *families)
    for each in chosen:
        for role, source in got.sources(each.name).items():
            assert source == whole.sources(each.name)[role], "a model's units stay its own whoever is served beside it"


def test_a_changed_bit_parts_one_encoder_and_no_other(families: tuple[ModelFolder, ...], tmp_path: Path) -> None:
    folder = sdxl_folder(tmp_path / "finetuned")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["final_layer_norm.bias"].view(torch.int32)[3] ^= 1
    save_file(tensors, file)
    registry = registered(tmp_path, *families, model(folder))
    clips = [each for each in registry.encoders if each.part.name == CLIP]
    assert len(registry.encoders) == 4
    assert [each.models for each in clips] == [("sd", "sdxl", "sd3", "flux"), ("finetuned",)]
    assert [each.name for each in clips] == [f"{CLIP}-{each.fingerprint[:6]}" for each in clips]
    opened = (registry.sources(name)["text_encoder_2"].fingerprint for name in ("finetuned", "sdxl"))
    assert len(set(opened)) == 1
    assert all(re.fullmatch(r"[a-z0-9-]+", each.name) for each in registry.encoders), "fit for a deployment's name"


def test_files_of_two_precisions_are_one_encoder_where_it_runs_in_the_lower(tmp_path: Path) -> None:
    full = model(sdxl_folder(tmp_path / "full"))
    half = model(sd3_folder(tmp_path / "half", with_t5=False, dtype=torch.float16))
    assert len(registered(tmp_path, full, half).encoders) == 4
    assert len(registered(tmp_path, full, half, encoder={"dtype": "float16"}).encoders) == 2


def test_two_projections_on_one_trunk(tmp_path: Path) -> None:
    """One encoder, one forward, two outputs; a trunk is what costs."""
    first, second = (model(sdxl_folder(tmp_path / name)) for name in ("first", "second"))
    file = second.text[1].weights / "model.safetensors"
    tensors = load_file(file)
    tensors["text_projection.weight"] *= 2
    save_file(tensors, file)
    opened = registered(tmp_path, first, second).named(OPEN)
    assert {part for _, part in opened.projections} == {first.text[1], second.text[1]}
    assert len([output for output in opened.outputs if output.startswith("projected:")]) == 2


def test_one_model_alone_reads_no_more_than_it_needs(tmp_path: Path) -> None:
    (clip,) = registered(tmp_path, model(sd_folder(tmp_path / "sd"))).encoders
    assert (clip.outputs, clip.projections) == (("hidden",), ())
    pair = registered(tmp_path, model(sd3_folder(tmp_path / "sd3", with_t5=False)))
    assert [each.name for each in pair.encoders] == [CLIP, OPEN]
    assert list(pair.sources("sd3")) == ["text_encoder", "text_encoder_2"]


def test_settings_by_name(families: tuple[ModelFolder, ...], data_dir: Path) -> None:
    registry = registered(
        data_dir,
        *families,
        encoder={"max_batch_size": 8},
        encoders={T5: {"dtype": "bfloat16", "quantization": "int8", "min_replicas": 0}},
    )
    t5 = registry.named(T5).settings
    assert (t5.dtype, t5.quantization, t5.min_replicas, t5.max_batch_size) == ("bfloat16", "int8", 0, 8)
    assert registry.named(CLIP).settings.dtype == "float32"
    plain = registered(data_dir, *families)
    assert registry.named(CLIP).fingerprint == plain.named(CLIP).fingerprint
    assert registry.named(T5).fingerprint != plain.named(T5).fingerprint


@pytest.fixture
def two(families: tuple[ModelFolder, ...], tmp_path: Path) -> tuple[ModelFolder, ModelFolder]:
    """Two SDs whose encoders have one architecture and two sets of weights."""
    return families[0], model(sd_folder(tmp_path / "other", seed=1))


def test_settings_by_the_unique_name(two: tuple[ModelFolder, ModelFolder], data_dir: Path) -> None:
    first, second = registered(data_dir, *two).encoders
    shared = {CLIP: {"max_batch_size": 8, "dtype": "float16"}}
    first, second = registered(data_dir, *two, encoders=shared).encoders
    registry = registered(data_dir, *two, encoders=shared | {second.name: {"max_replicas": 3}})
    assert (registry.named(first.name).settings.max_replicas, registry.named(second.name).settings.max_replicas) == (
        1,
        3,
    )
    assert registry.named(second.name).settings.max_batch_size == 8
    assert registry.named(second.name).settings.dtype == "float16"
    assert registry.named(second.name).setting("max_replicas") == f"encoders.{second.name}.max_replicas"
    assert registry.named(second.name).setting("dtype") == f"encoders.{CLIP}.dtype"
    assert registry.named(first.name).setting("max_replicas") == "encoder.max_replicas"


def test_an_override_stands_on_that_of_its_architecture(two: tuple[ModelFolder, ModelFolder], data_dir: Path) -> None:
    first, second = registered(data_dir, *two).encoders
    overrides = {CLIP: {"max_replicas": 4}, second.name: {"min_replicas": 2}}
    registry = registered(data_dir, *two, encoders=overrides)
    replicas = {each.name: (each.settings.min_replicas, each.settings.max_replicas) for each in registry.encoders}
    assert replicas == {first.name: (1, 4), second.name: (2, 4)}


def test_the_whole_of_an_override_is_checked_here(families: tuple[ModelFolder, ...], data_dir: Path) -> None:
    """`clip` stands for nothing; at load it could have been what the other stands on."""
    message = refusal(data_dir, families[0], param=f"encoders.{CLIP}", encoders={"clip": {}, CLIP: {"min_replicas": 3}})
    assert message == f"encoders.{CLIP}: min_replicas 3 is more than max_replicas 1"


def test_models_that_could_share_an_encoder_and_do_not_are_told(
    two: tuple[ModelFolder, ModelFolder], data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        registered(data_dir, two[0])
        assert not caplog.messages
        registered(data_dir, *two)
        registered(data_dir, *two, encoder={"dtype": "bfloat16"})
    assert caplog.messages == [
        f"{CLIP} is 2 encoders in float32 (models sd; other): their weights differ; "
        "float16 or bfloat16 may make them one",
        f"{CLIP} is 2 encoders in bfloat16 (models sd; other): their weights differ",
    ]


def test_overrides_that_fit_nothing(two: tuple[ModelFolder, ModelFolder], data_dir: Path) -> None:
    first, second = registered(data_dir, *two).encoders
    names = ", ".join(sorted([CLIP, first.name, second.name]))
    assert f"there are {names}" in refusal(data_dir, *two, param="encoders.t5-xxl", encoders={"t5-xxl": {}})
    param = f"encoders.{second.name}"
    message = refusal(data_dir, *two, param=param, encoders={second.name: {"dtype": "bfloat16"}})
    assert f"set it for {CLIP}" in message
    message = refusal(
        data_dir,
        *two,
        param=param,
        encoders={CLIP: {"min_replicas": 2, "max_replicas": 2}, second.name: {"max_replicas": 1}},
    )
    reason = f"min_replicas 2 is more than max_replicas 1 (with what encoders.{CLIP} says)"
    assert message == f"{param}: {reason}"


def test_two_models_of_one_name(families: tuple[ModelFolder, ...], data_dir: Path) -> None:
    assert "called sd;" in refusal(data_dir, families[0], families[0], param="text_models")


def test_weights_that_break_after_the_check_are_refused_by_the_models_setting(tmp_path: Path) -> None:
    folder = sd_folder(tmp_path / "sd")
    found = resolve(ModelSettings(source=str(folder)), tmp_path, text_only=True, setting="text_models.0")
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors is cut off" in refusal(tmp_path, found, param="text_models.0.source")
