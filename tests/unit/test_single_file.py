"""Single-file checkpoints: the shipped model is written in the LDM key layout, and must come back as it was."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.diffusion.single_file import convert, main
from serve.errors import OperatorError
from serve.models import SHIPPED, ModelFolder, check_folder, resolve
from serve.models.sources import conversion_digest
from serve.settings import ModelSettings

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MID = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}


def unet_key(name: str, per_block: int, attended: set[str]) -> str:
    """LDM numbers the layers of all blocks through; a resampler follows its block's last layer."""
    for ours, theirs in TOP.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    if mid := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        return f"middle_block.{MID[f'{mid[1]}.{mid[2]}']}.{_layer(mid[1], mid[3])}"
    side, block, kind, index, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name).groups()
    number = int(block) * (per_block + 1) + int(index)
    if kind == "downsamplers":
        return f"input_blocks.{number + per_block + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{number + per_block}.{2 if block in attended else 1}.{rest}"
    place = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
    return f"{place}.{1 if kind == 'attentions' else 0}.{_layer(kind, rest)}"


def _layer(kind: str, rest: str) -> str:
    first, _, last = rest.partition(".")
    return f"{RESNET[first]}.{last}" if kind == "resnets" else rest


def vae_key(name: str, blocks: int) -> str:
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{blocks - 1 - int(found[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    for ours, theirs in (
        ("down_blocks", "down"),
        ("resnets", "block"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    ):
        name = name.replace(ours, theirs)
    return name


def ldm_checkpoint() -> dict[str, torch.Tensor]:
    unet, vae = (load_file(SHIPPED / part / "diffusion_pytorch_model.safetensors") for part in ("unet", "vae"))
    text = load_file(SHIPPED / "text_encoder" / "model.safetensors")
    per_block = json.loads((SHIPPED / "unet" / "config.json").read_text())["layers_per_block"]
    blocks = len(json.loads((SHIPPED / "vae" / "config.json").read_text())["up_block_types"])
    attended = {found[1] for name in unet if (found := re.match(r"up_blocks\.(\d)\.attentions", name))}
    return {
        **{f"model.diffusion_model.{unet_key(name, per_block, attended)}": value for name, value in unet.items()},
        **{f"first_stage_model.{vae_key(name, blocks)}": value for name, value in vae.items()},
        **{
            f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": value
            for name, value in text.items()
        },
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("checkpoint") / "shapes-v1.safetensors"
    save_file({name: value.contiguous() for name, value in ldm_checkpoint().items()}, file)
    return file


def find(file: Path, data_dir: Path, config: Path | str | None = SHIPPED) -> ModelFolder:
    return resolve(ModelSettings(source=str(file), config=None if config is None else str(config)), data_dir)


def refusal(file: Path, data_dir: Path, config: Path | str | None = SHIPPED, param: str = "model.source") -> str:
    with pytest.raises(OperatorError) as raised:
        find(file, data_dir, config)
    assert raised.value.param == param
    assert "\n" not in raised.value.message
    assert [path.name for path in data_dir.rglob("*") if path.is_file() and path.name != ".lock"] == []
    return raised.value.message


def test_a_checkpoint_becomes_the_folder_it_was_made_from(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, SHIPPED, tmp_path)
    for file in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        expected, got = (
            {name.removeprefix("text_model."): value for name, value in load_file(root / f"{file}.safetensors").items()}
            for root in (SHIPPED, tmp_path)
        )
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert got[name].dtype == value.dtype
            assert torch.equal(got[name], value)
    shipped = check_folder(SHIPPED, "shapes")
    (text,) = shipped.text
    moved = replace(text, weights=tmp_path / "text_encoder", tokenizer=tmp_path / "tokenizer")
    assert check_folder(tmp_path, "shapes") == replace(shipped, path=tmp_path, text=(moved,))


def test_mixed_precision_is_not_rounded(tmp_path: Path) -> None:
    weights = ldm_checkpoint()
    name = "first_stage_model.decoder.conv_in.weight"
    weights[name] = weights[name].float() + 1e-6
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "mixed.safetensors")
    convert(tmp_path / "mixed.safetensors", SHIPPED, tmp_path / "out")
    got = load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(got["decoder.conv_in.weight"], weights[name])


def test_a_checkpoint_is_converted_once(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "models" / ".converting-by-a-process-that-was-killed").mkdir(parents=True)
    model = find(checkpoint, tmp_path)
    assert model.name == "shapes-v1"
    assert model.path.parent == tmp_path / "models"
    made = model.path.stat().st_ino
    assert find(checkpoint, tmp_path) == model
    assert model.path.stat().st_ino == made
    assert sorted((tmp_path / "models").iterdir()) == [tmp_path / "models" / ".lock", model.path]


def test_another_configuration_or_checkpoint_is_another_conversion(checkpoint: Path, tmp_path: Path) -> None:
    config = Path(shutil.copytree(SHIPPED, tmp_path / "config"))
    copy = Path(shutil.copy2(checkpoint, tmp_path / "copy.safetensors"))
    first = conversion_digest(checkpoint, str(config))
    assert conversion_digest(copy, str(config)) == first
    scheduler = config / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("v_prediction", "epsilon"))
    second = conversion_digest(checkpoint, str(config))
    copy.touch()
    assert len({first, second, conversion_digest(copy, str(config)), conversion_digest(checkpoint, None)}) == 4


def test_refusals_that_need_no_conversion(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:-1])
    assert "is cut off" in refusal(cut, data)
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"\x80\x04")
    assert "pickled" in refusal(pickled, data)
    for key, named in (
        ("conditioner.embedders.1.model.ln_final.weight", "SDXL"),
        ("model.diffusion_model.joint_blocks.0.x", "SD 3"),
        ("double_blocks.0.img_attn.norm", "FLUX"),
        ("lora_unet_down.weight", "a LoRA"),
        ("model.diffusion_model.input_blocks.0.0.weight", "no VAE"),
        ("first_stage_model.encoder.conv_in.weight", "no U-Net"),
    ):
        file = tmp_path / "other.safetensors"
        save_file({key: torch.zeros(1)}, file)
        assert named in refusal(file, data)
    assert "neither a folder nor a hub id" in refusal(checkpoint, data, "/no/such/folder", param="model.config")


def test_a_configuration_of_another_size_is_refused_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    config = Path(shutil.copytree(SHIPPED, tmp_path / "config"))
    file = config / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"block_out_channels": [64, 128, 192]}))
    message = refusal(checkpoint, tmp_path / "data", config)
    assert "can't be converted" in message
    assert "expected shape" in message


def last_words(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """What the conversion, run as a program, says to stderr at its end."""
    monkeypatch.setattr("sys.argv", ["single_file", *map(str, arguments)])
    with pytest.raises(SystemExit) as raised:
        main()
    assert isinstance(raised.value.code, str)
    assert "\n" not in raised.value.code
    return raised.value.code


@pytest.mark.parametrize("part", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
def test_missing_weights_are_refused_not_invented(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {name: value.contiguous() for name, value in ldm_checkpoint().items()}
    del weights[next(name for name in reversed(weights) if name.startswith(part) and name.endswith(".weight"))]
    save_file(weights, tmp_path / "some.safetensors")
    assert "lacks weights" in last_words(monkeypatch, tmp_path / "some.safetensors", tmp_path / "out", SHIPPED)


def test_no_configuration_and_no_hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "model.config" in last_words(monkeypatch, checkpoint, tmp_path / "out")


def test_a_data_dir_that_can_not_be_written(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(OperatorError) as raised:
        find(checkpoint, tmp_path / "data")
    assert raised.value.param == "data_dir"
