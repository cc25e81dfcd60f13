import fcntl
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.text_models import flux_folder, sd3_folder, sdxl_folder
from transformers import T5EncoderModel

from serve.domain.text import EncodeUnit
from serve.encoders.unit import fingerprint, projection_id
from serve.models import SHIPPED, ModelFolder, TextPart, resolve
from serve.settings.pools import ModelSettings


def parts(folder: Path) -> dict[str, TextPart]:
    model: ModelFolder = resolve(ModelSettings(source=str(folder)), Path("unused"), text_only=True)
    return {part.role: part for part in model.text}


def of(part: TextPart, data_dir: Path, dtype: str = "float32", quantization: str = "none") -> str:
    found = fingerprint(part, dtype, quantization, data_dir)
    assert len(found) == 32
    return found


def edit(part: TextPart, **changes: object) -> None:
    file = part.weights / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(part: TextPart, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(part.weights / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part.weights / "model.safetensors")


@pytest.fixture
def clip(tmp_path: Path) -> TextPart:
    """A CLIP with a projection."""
    return parts(sd3_folder(tmp_path / "sd3", with_t5=False))["text_encoder"]


@pytest.fixture
def t5(tmp_path: Path) -> TextPart:
    return parts(flux_folder(tmp_path / "flux"))["text_encoder_2"]


def test_one_trunk_in_three_families(tmp_path: Path) -> None:
    sdxl, sd3, flux = (parts(make(tmp_path / make.__name__)) for make in (sdxl_folder, sd3_folder, flux_folder))
    data = tmp_path / "data"
    clip = {of(each["text_encoder"], data) for each in (sdxl, sd3, flux)}
    assert len(clip) == 1
    assert of(sdxl["text_encoder_2"], data) == of(sd3["text_encoder_2"], data)
    assert of(sd3["text_encoder_3"], data) == of(flux["text_encoder_2"], data)
    assert len({*clip, of(sdxl["text_encoder_2"], data), of(flux["text_encoder_2"], data)}) == 3


def test_precision_is_part_of_it(clip: TextPart, tmp_path: Path) -> None:
    found = {of(clip, tmp_path, dtype) for dtype in ("float32", "float16", "bfloat16")}
    found |= {of(clip, tmp_path, "float32", "int8"), of(clip, tmp_path, "float32", "int4")}
    assert len(found) == 5


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> TextPart:
    """Values that float16 holds, so that every storage type of at least 16 bits but bfloat16 does."""
    folder = sd3_folder(tmp_path_factory.mktemp("trunk") / "sd3", with_t5=False, dtype=torch.float16)
    return parts(folder)["text_encoder"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_how_it_is_stored_makes_no_difference(
    trunk: TextPart, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Shards, spelling, storage type, order, what else lies there."""
    folder = tmp_path_factory.mktemp("stored")
    shutil.copy(trunk.weights / "config.json", folder)
    tensors = load_file(trunk.weights / "model.safetensors")
    prefix = data.draw(st.sampled_from(["", "text_model."]))
    shards = data.draw(st.integers(1, 3))
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name, tensor in tensors.items():
        stored = name if name.startswith("text_projection") else prefix + name.removeprefix("text_model.")
        dtype = data.draw(st.sampled_from([torch.float16, torch.float32, torch.float64]))
        files[data.draw(st.integers(0, shards - 1))][stored] = tensor.to(dtype)
    if data.draw(st.booleans()):
        files[0][f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    if shards == 1:
        save_file(files[0], folder / "model.safetensors")
    else:
        for number, file in enumerate(files):
            save_file(file or {"embeddings.position_ids": torch.zeros(1)}, folder / f"{number}.safetensors")
        places = {name: f"{number}.safetensors" for number, file in enumerate(files) for name in file}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    dtype = data.draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    elsewhere = replace(trunk, weights=folder)
    assert of(elsewhere, folder / "data", dtype) == of(trunk, folder / "data", dtype)
    assert projection_id(elsewhere, dtype) == projection_id(trunk, dtype)
    shutil.rmtree(folder)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_one_bit_of_one_tensor_is_another_encoder(
    trunk: TextPart, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("bit")
    shutil.copytree(trunk.weights, folder / "encoder")
    other = replace(trunk, weights=folder / "encoder")
    name = data.draw(st.sampled_from(sorted(load_file(trunk.weights / "model.safetensors"))))

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        bits = tensors[name].view(-1).view(torch.int16)
        bits[data.draw(st.integers(0, len(bits) - 1))] ^= 1

    edit_tensors(other, flip)
    projected = name == "text_projection.weight"
    for dtype in ("float32", "float16"):
        assert (of(other, folder, dtype) == of(trunk, folder, dtype)) == projected
        assert (projection_id(other, dtype) == projection_id(trunk, dtype)) != projected
    shutil.rmtree(folder)


def test_a_difference_that_the_precision_rounds_away_is_none(clip: TextPart, tmp_path: Path) -> None:
    coarse = {dtype: of(clip, tmp_path, dtype) for dtype in ("float32", "float16")}
    edit_tensors(
        clip, lambda tensors: tensors.update({name: tensor.half().float() for name, tensor in tensors.items()})
    )
    assert of(clip, tmp_path, "float16") == coarse["float16"]
    assert of(clip, tmp_path, "float32") != coarse["float32"]


def test_the_layer_of_t5_that_stays_in_float32_counts_in_float32(t5: TextPart, tmp_path: Path) -> None:
    model = T5EncoderModel.from_pretrained(t5.weights, dtype=torch.float16)
    wide = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert wide
    assert all(name.endswith(".wo.weight") for name in wide)
    before = of(t5, tmp_path, "float16")
    query = "encoder.block.1.layer.0.SelfAttention.q.weight"
    edit_tensors(t5, lambda tensors: tensors.update({query: tensors[query].half().float()}))
    assert of(t5, tmp_path, "float16") == before
    name = min(wide)
    edit_tensors(t5, lambda tensors: tensors.update({name: tensors[name].half().float()}))
    assert of(t5, tmp_path, "float16") != before


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "gelu"}, {"layer_norm_eps": 1e-6}, {"num_attention_heads": 2}, {"eos_token_id": 5}]
)
def test_what_clip_computes_is_part_of_it(clip: TextPart, tmp_path: Path, changes: dict[str, object]) -> None:
    before = of(clip, tmp_path)
    edit(clip, **changes)
    assert of(clip, tmp_path) != before


@pytest.mark.parametrize(
    "changes",
    [{"dense_act_fn": "relu"}, {"layer_norm_epsilon": 1e-5}, {"relative_attention_max_distance": 64}],
)
def test_what_t5_computes_is_part_of_it(t5: TextPart, tmp_path: Path, changes: dict[str, object]) -> None:
    before = of(t5, tmp_path)
    edit(t5, **changes)
    assert of(t5, tmp_path) != before


def test_what_computes_nothing_is_no_part_of_it(clip: TextPart, t5: TextPart, tmp_path: Path) -> None:
    before = of(clip, tmp_path), of(t5, tmp_path)
    edit(
        clip, architectures=["CLIPTextModel"], dtype="float16", attention_dropout=0.1, projection_dim=99, eos_token_id=2
    )
    edit(t5, num_decoder_layers=9, dropout_rate=0.5, use_cache=True, is_encoder_decoder=True)
    (clip.weights / "README.md").write_text("no part of it")
    (clip.tokenizer / "merges.txt").unlink(missing_ok=True)
    assert (of(clip, tmp_path), of(t5, tmp_path)) == before


def test_t5s_embedding_by_either_name(t5: TextPart, tmp_path: Path) -> None:
    before = of(t5, tmp_path)
    edit_tensors(t5, lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}))
    assert of(t5, tmp_path) == before
    edit_tensors(t5, lambda tensors: tensors.pop("shared.weight"))
    assert of(t5, tmp_path) == before


def test_of_two_embeddings_the_one_counts_that_transformers_reads(t5: TextPart, tmp_path: Path) -> None:
    before = of(t5, tmp_path)
    model = T5EncoderModel.from_pretrained(t5.weights)
    own = "encoder.embed_tokens.weight"
    edit_tensors(t5, lambda tensors: tensors.update({own: tensors["shared.weight"] + 1}))
    assert of(t5, tmp_path) != before
    edit_tensors(
        t5,
        lambda tensors: tensors.update({own: tensors["shared.weight"].clone(), "shared.weight": tensors[own].clone()}),
    )
    assert of(t5, tmp_path) == before
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        untied = T5EncoderModel.from_pretrained(t5.weights)(ids).last_hidden_state
        assert torch.equal(untied, model(ids).last_hidden_state)


def note_of(data_dir: Path) -> Path:
    (note,) = (path for path in (data_dir / "fingerprints").iterdir() if path.name != ".lock")
    return note


def test_the_weights_are_read_once(clip: TextPart, tmp_path: Path) -> None:
    """A false note is believed: nobody has looked at the weights."""
    found = of(clip, tmp_path / "a")
    assert note_of(tmp_path / "a").read_text() == found
    (tmp_path / "b" / "fingerprints").mkdir(parents=True)
    (tmp_path / "b" / "fingerprints" / note_of(tmp_path / "a").name).write_text("f" * 32)
    assert of(clip, tmp_path / "b") == "f" * 32
    shutil.rmtree(tmp_path / "a")
    assert of(clip, tmp_path / "a") == found, "this process remembers"
    assert not (tmp_path / "a").exists()


def test_a_note_that_is_none_is_written_anew(clip: TextPart, tmp_path: Path) -> None:
    found = of(clip, tmp_path / "a")
    for number, garbage in enumerate((b"", found[:9].encode(), b"\xff" * 32)):
        data = tmp_path / str(number)
        (data / "fingerprints").mkdir(parents=True)
        (data / "fingerprints" / note_of(tmp_path / "a").name).write_bytes(garbage)
        assert of(clip, data) == found
        assert note_of(data).read_text() == found


def test_weights_that_change_leave_their_note_behind(t5: TextPart, tmp_path: Path) -> None:
    """Even where the new ones are as long and claim to be as old."""
    file = t5.weights / "model.safetensors"
    before, stat = of(t5, tmp_path), file.stat()
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns
    assert of(t5, tmp_path) != before


def test_processes_that_start_together_read_the_weights_once(clip: TextPart, tmp_path: Path) -> None:
    """While another process holds the lock nobody reads; what it notes then is what all take."""
    found = of(clip, tmp_path / "a")
    notes = tmp_path / "b" / "fingerprints"
    notes.mkdir(parents=True)
    with (notes / ".lock").open("w") as lock, ThreadPoolExecutor() as threads:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threads.submit(of, clip, tmp_path / "b")
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        (notes / note_of(tmp_path / "a").name).write_text("e" * 32)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert waiting.result(30) == "e" * 32
    assert found != "e" * 32


def test_a_data_dir_that_can_not_be_written_costs_time_alone(clip: TextPart, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert of(clip, tmp_path / "file") == of(clip, tmp_path / "data")


def test_projections_have_names_of_their_own(tmp_path: Path) -> None:
    sd3 = parts(sd3_folder(tmp_path / "sd3"))
    ids = {projection_id(sd3[role], "float32") for role in ("text_encoder", "text_encoder_2")}
    assert len(ids) == 2
    assert all(name is not None and len(name) == 8 for name in ids)
    assert projection_id(sd3["text_encoder_3"], "float32") is None


def test_the_shipped_encoder(tmp_path: Path) -> None:
    (part,) = resolve(ModelSettings(), tmp_path).text
    copied = replace(part, weights=Path(shutil.copytree(SHIPPED / "text_encoder", tmp_path / "copy")))
    assert of(copied, tmp_path) == of(part, tmp_path)


def test_units_differ_in_every_part_of_their_key() -> None:
    unit = EncodeUnit("encoder", (1, 2, 3))
    others = [
        replace(unit, encoder="other"),
        replace(unit, token_ids=(1, 2)),
        replace(unit, output="pooled"),
        replace(unit, salt="tenant"),
    ]
    assert len({each.key for each in (unit, *others)}) == 5
    assert unit.key == EncodeUnit("encoder", (1, 2, 3)).key
    assert len(unit.key) == 40
