"""Single-file checkpoints: models are written in their authors' key layouts, and must come back as they were."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.image_models import flux_model, sd3_model, sd_model, sdxl_model, sdxl_refiner_model

from serve.diffusion.single_file import convert, main
from serve.diffusion.single_file_flux import flux_tensors
from serve.diffusion.single_file_text import text_encoder
from serve.errors import OperatorError
from serve.models import SHIPPED, ModelFolder, check_folder, resolve
from serve.models.checkpoints import recognised
from serve.models.conversion import conversion_digest
from serve.settings.pools import ModelSettings


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(checkpoints.sd(SHIPPED), tmp_path_factory.mktemp("checkpoint") / "shapes-v1.safetensors")


def find(file: Path, data_dir: Path, config: Path | str | None = SHIPPED) -> ModelFolder:
    return resolve(ModelSettings(source=str(file), config=None if config is None else str(config)), data_dir)


def refusal(file: Path, data_dir: Path, config: Path | str | None = SHIPPED, param: str = "model.source") -> str:
    with pytest.raises(OperatorError) as raised:
        find(file, data_dir, config)
    assert raised.value.param == param
    assert "\n" not in raised.value.message
    assert [path.name for path in data_dir.rglob("*") if path.is_file() and path.name != ".lock"] == []
    return raised.value.message


def assert_same(part: str, made: Path, original: Path) -> None:
    expected, got = (
        {name.removeprefix("text_model."): value for name, value in checkpoints.part(root, part).items()}
        for root in (original, made)
    )
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value), name


def test_a_checkpoint_becomes_the_folder_it_was_made_from(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(checkpoint, SHIPPED, out)
    for part in ("unet", "vae", "text_encoder"):
        assert_same(part, out, SHIPPED)
    shipped = check_folder(SHIPPED, "shapes")
    (text,) = shipped.text
    moved = replace(text, weights=out / "text_encoder", tokenizer=out / "tokenizer")
    assert check_folder(out, "shapes") == replace(shipped, path=out, text=(moved,))


Layout = Callable[[Path], dict[str, torch.Tensor]]
WHOLE: dict[str, tuple[Callable[[Path], Path], Layout]] = {
    "sd": (sd_model, checkpoints.sd),
    "sd-v": (lambda path: sd_model(path, prediction_type="v_prediction"), checkpoints.sd),
    "sd-inpainting": (lambda path: sd_model(path, in_channels=9), checkpoints.sd),
    "sd2": (sd_model, checkpoints.sd2),
    "sdxl": (sdxl_model, checkpoints.sdxl),
    "sdxl-inpainting": (lambda path: sdxl_model(path, in_channels=9), checkpoints.sdxl),
    "sdxl-refiner": (sdxl_refiner_model, checkpoints.sdxl_refiner),
    "sd35": (sd3_model, lambda path: checkpoints.sd3(path) | checkpoints.ldm_vae(path) | checkpoints.sd3_text(path)),
}
TRANSFORMERS: dict[str, tuple[Callable[[Path], Path], Layout]] = {
    "sd3": (lambda path: sd3_model(path, dual_attention=False), checkpoints.sd3),
    "sd35": (sd3_model, checkpoints.sd3),
    "sd35-without-t5": (lambda path: sd3_model(path, with_t5=False), checkpoints.sd3),
    "flux-dev": (flux_model, checkpoints.flux),
    "flux-schnell": (lambda path: flux_model(path, guidance_embeds=False), checkpoints.flux),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_checkpoints(kind: str, tmp_path: Path) -> None:
    build, layout = WHOLE[kind]
    original = build(tmp_path / "original")
    file = checkpoints.write(layout(original), tmp_path / "model.safetensors")
    expected = check_folder(original, "model")
    assert recognised(file).family == expected.family
    assert recognised(file).lacking == ()
    made = tmp_path / "made"
    convert(file, original, made)
    found = check_folder(made, "model")
    assert found.denoiser == expected.denoiser
    denoiser = "transformer" if expected.family == "sd3" else "unet"
    for part in (denoiser, "vae", *(part.role for part in expected.text)):
        assert_same(part, made, original)
        assert not (made / part).is_symlink()
    assert [
        replace(text, weights=part.weights, tokenizer=part.tokenizer)
        for text, part in zip(found.text, expected.text, strict=True)
    ] == list(expected.text)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_transformer_alone_takes_the_rest_from_the_configuration(kind: str, tmp_path: Path) -> None:
    build, layout = TRANSFORMERS[kind]
    original = build(tmp_path / "original")
    file = checkpoints.write(layout(original), tmp_path / "model.safetensors")
    expected = check_folder(original, "model")
    made = tmp_path / "made"
    convert(file, original, made)
    assert check_folder(made, "model").denoiser == expected.denoiser
    assert_same("transformer", made, original)
    for part in ("vae", *(part.role for part in expected.text)):
        assert (made / part).resolve() == original / part


def test_what_comfyui_puts_into_one_file(tmp_path: Path) -> None:
    """FLUX with its VAE and text encoders, its transformer in eight bits."""
    original = flux_model(tmp_path / "original")
    parts = checkpoints.part(original, "transformer")
    rounded = {name: value.to(torch.float8_e4m3fn) for name, value in checkpoints.flux(original).items()}
    clip = {_clip(name): value.half() for name, value in checkpoints.part(original, "text_encoder").items()}
    t5 = {
        f"text_encoders.t5xxl.transformer.{name}": value.half()
        for name, value in checkpoints.part(original, "text_encoder_2").items()
    }
    vae = {name: value.half() for name, value in checkpoints.ldm_vae(original, "vae.").items()}
    whole = {f"{checkpoints.UNET}{name}": value for name, value in rounded.items()}
    file = checkpoints.write(whole | clip | t5 | vae, tmp_path / "flux1-dev-fp8.safetensors")
    assert recognised(file).lacking == ()
    made = tmp_path / "made"
    convert(file, original, made)
    got = checkpoints.part(made, "transformer")
    assert got.keys() == parts.keys()
    for name, value in parts.items():
        assert got[name].dtype == torch.float16
        assert torch.equal(got[name], value.to(torch.float8_e4m3fn).half()), name
    for part in ("vae", "text_encoder", "text_encoder_2"):
        assert not (made / part).is_symlink()
        halves, read = checkpoints.part(original, part), checkpoints.part(made, part)
        assert all(torch.equal(read[_spelled(name, read)], value.half()) for name, value in halves.items())
    assert check_folder(made, "flux").denoiser == check_folder(original, "flux").denoiser


def _clip(name: str) -> str:
    return f"text_encoders.clip_l.transformer.text_model.{name.removeprefix('text_model.')}"


def test_a_clip_without_a_projection_has_one_that_changes_nothing(tmp_path: Path) -> None:
    """SD 3 reads CLIP-L's pooled output, and files with text encoders may leave its projection out."""
    original = sd3_model(tmp_path / "original")
    weights = checkpoints.sd3(original) | checkpoints.sd3_text(original)
    del weights["text_encoders.clip_l.transformer.text_projection.weight"]
    file = checkpoints.write(weights, tmp_path / "sd3.safetensors")
    text_encoder(recognised(file), "text_encoder", original, torch.float16, tmp_path / "made")
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert torch.equal(made["text_projection.weight"], torch.eye(32, dtype=torch.float16))


def _spelled(name: str, tensors: dict[str, torch.Tensor]) -> str:
    return name if name in tensors else f"text_model.{name}"


def test_flux_is_mapped_as_diffusers_maps_it() -> None:
    """Diffusers' own mapping works at FLUX's real width alone; the columns are as good as any when they are few."""
    width, names = 3072, {}
    for stream in ("img", "txt"):
        names |= {f"{stream}_mod.lin": 6, f"{stream}_attn.qkv": 3, f"{stream}_attn.proj": 1, f"{stream}_mlp.0": 4}
        names |= {f"{stream}_mlp.2": 1}
    double = {f"double_blocks.{block}.{name}": rows * width for block in (0, 1) for name, rows in names.items()}
    single = {"modulation.lin": 3, "linear1": 7, "linear2": 1}
    rows = double | {
        f"single_blocks.{block}.{name}": count * width for block in (0, 1) for name, count in single.items()
    }
    rows |= {
        f"{place}.{layer}_layer": 2 for place in ("time_in", "vector_in", "guidance_in") for layer in ("in", "out")
    }
    rows |= {"img_in": 2, "txt_in": 2, "final_layer.linear": 2, "final_layer.adaLN_modulation.1": 4}
    file = {f"{name}.weight": torch.rand(count, 1) for name, count in rows.items()}
    file |= {f"{name}.bias": torch.rand(count) for name, count in rows.items()}
    scales = [f"double_blocks.{block}.{stream}_attn.norm" for block in (0, 1) for stream in ("img", "txt")]
    scales += [f"single_blocks.{block}.norm" for block in (0, 1)]
    file |= {f"{name}.{which}_norm.scale": torch.rand(8) for name in scales for which in ("query", "key")}
    ours = {name: value for key, tensor in file.items() for name, value in flux_tensors(key, tensor, width)}
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(file))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_parts_that_neither_file_nor_configuration_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sd3_model(tmp_path / "original")
    file = checkpoints.write(checkpoints.sd3(original), tmp_path / "model.safetensors")
    with pytest.raises(OperatorError, match=r"has no VAE \(first_stage_model\.\*\); set model\.config"):
        find(file, tmp_path / "data", None)
    for weights in (original / "text_encoder_3").glob("*.safetensors"):
        weights.unlink()
    convert(file, original, tmp_path / "without-t5")
    assert [part.role for part in check_folder(tmp_path / "without-t5", "sd3").text] == [
        "text_encoder",
        "text_encoder_2",
    ]
    for weights in (original / "vae").glob("*.safetensors"):
        weights.unlink()
    words = last_words(monkeypatch, file, tmp_path / "out", original)
    assert words.startswith("it has no VAE (first_stage_model.*), and model.config (")


def test_a_configuration_of_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sd3_model(tmp_path / "original")
    file = checkpoints.write(checkpoints.sd3(original), tmp_path / "model.safetensors")
    words = last_words(monkeypatch, file, tmp_path / "out", SHIPPED)
    assert words.startswith("it is of the sd3 family, and model.config (")
    xl = sdxl_model(tmp_path / "xl")
    file = checkpoints.write(checkpoints.sdxl(xl), tmp_path / "xl.safetensors")
    config = xl / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transformer_layers_per_block": [1, 1]}))
    words = last_words(monkeypatch, file, tmp_path / "out-xl", xl)
    assert words.startswith("its unet has ")
    assert "weights, and model.config (" in words
    dev = checkpoints.write(checkpoints.flux(flux_model(tmp_path / "dev")), tmp_path / "dev.safetensors")
    schnell = flux_model(tmp_path / "schnell", guidance_embeds=False)
    assert "guidance_embedder" in last_words(monkeypatch, dev, tmp_path / "out-schnell", schnell)


@pytest.mark.slow
def test_the_rest_from_the_hub_at_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = flux_model(_folder(tmp_path / "hub" / "models--someone--flux" / "snapshots" / commit))
    file = checkpoints.write(checkpoints.flux(snapshot), tmp_path / "flux.safetensors")
    settings = ModelSettings(source=str(file), config="someone/flux", revision=commit, num_inference_steps=9)
    model = resolve(settings, tmp_path / "data")
    assert (model.family, model.name) == ("flux", "flux")
    assert model.denoiser is not None
    assert model.denoiser.default_num_inference_steps == 9
    assert (model.path / "text_encoder_2").resolve() == snapshot / "text_encoder_2"


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_the_rest_from_the_hub_needs_a_commit(tmp_path: Path) -> None:
    file = checkpoints.write({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, tmp_path / "flux.safetensors")
    assert "needs a full commit hash" in refusal(file, tmp_path / "data", "someone/flux", param="model.revision")


def test_mixed_precision_is_not_rounded(tmp_path: Path) -> None:
    weights = checkpoints.sd(SHIPPED)
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
        (
            "conditioner.embedders.1.model.ln_final.weight",
            "no U-Net or transformer (model.diffusion_model.input_blocks.*",
        ),
        ("first_stage_model.encoder.conv_in.weight", "no U-Net or transformer"),
        ("lora_unet_down.weight", "is a LoRA"),
        ("transformer.blocks.0.attn.lora_A.weight", "is a LoRA"),
        ("control_model.input_blocks.0.0.weight", "is a ControlNet"),
        ("model.diffusion_model.double_blocks.0.img_mlp.0.scale_weight", "is quantized with scales"),
        ("double_blocks.0.img_mlp.0.weight.absmax", "is quantized with scales"),
        ("double_layers.0.attn.w2q.weight", "AuraFlow"),
    ):
        file = tmp_path / "other.safetensors"
        save_file({key: torch.zeros(1)}, file)
        assert named in refusal(file, data)
    unet = tmp_path / "unet.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, unet)
    assert "has no VAE (first_stage_model.*); set model.config" in refusal(unet, data, None)
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


@pytest.mark.parametrize("part", ["model.diffusion_model.", "first_stage_model."])
def test_missing_weights_are_refused_not_invented(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {name: value.contiguous() for name, value in checkpoints.sd(SHIPPED).items()}
    del weights[next(name for name in reversed(weights) if name.startswith(part) and name.endswith(".weight"))]
    save_file(weights, tmp_path / "some.safetensors")
    assert "lacks weights" in last_words(monkeypatch, tmp_path / "some.safetensors", tmp_path / "out", SHIPPED)


def test_missing_weights_of_a_text_encoder_are_refused_by_name(tmp_path: Path) -> None:
    weights = checkpoints.sd(SHIPPED)
    name = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
    del weights[name]
    # Checkpoints of Stable Diffusion 1.x hold this constant.
    weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    file = checkpoints.write(weights, tmp_path / "some.safetensors")
    convert(file, SHIPPED, tmp_path / "out")
    with pytest.raises(OperatorError, match=r"weights lack encoder\.layers\.1\.mlp\.fc1\.weight"):
        check_folder(tmp_path / "out", "some")


def test_no_configuration_and_no_hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "model.config" in last_words(monkeypatch, checkpoint, tmp_path / "out")


def test_a_data_dir_that_can_not_be_written(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(OperatorError) as raised:
        find(checkpoint, tmp_path / "data")
    assert raised.value.param == "data_dir"
