import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from serve.domain.orders import Task
from serve.errors import OperatorError
from serve.models import SHIPPED, Denoiser, ModelFolder, TextPart, resolve
from serve.settings.pools import ModelSettings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped model that a test may spoil."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "my-model"))


def find(source: object, tmp_path: Path = Path("unused"), **settings: str) -> ModelFolder:
    return resolve(ModelSettings(source=str(source), **settings), tmp_path)


def refusal(source: object, tmp_path: Path = Path("unused"), param: str = "model.source", **settings: str) -> str:
    with pytest.raises(OperatorError) as raised:
        find(source, tmp_path, **settings)
    assert raised.value.param == param
    assert raised.value.message.startswith(f"{param}: ")
    assert "\n" not in raised.value.message
    return raised.value.message


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not None}))


def test_the_shipped_model() -> None:
    model = find("shapes")
    assert model == ModelFolder(
        name="shapes",
        path=SHIPPED,
        family="sd",
        text=(
            TextPart(
                role="text_encoder",
                kind="clip",
                name="clip-128x2",
                weights=SHIPPED / "text_encoder",
                tokenizer=SHIPPED / "tokenizer",
                width=128,
                layers=2,
                vocab_size=918,
                projection=None,
                row_tokens=77,
            ),
        ),
        context_width=128,
        zero_empty_negative=False,
        denoiser=Denoiser(
            default_width=128,
            default_height=128,
            size_multiple=8,
            vae_scale_factor=8,
            latent_channels=4,
            in_channels=4,
            prediction_type="v_prediction",
            process="diffusion",
            guidance="classifier_free",
            tasks=frozenset(Task),
            default_num_inference_steps=20,
            default_guidance_scale=3.0,
            default_strength=0.8,
        ),
    )


def test_a_folder_is_named_after_itself_or_as_asked(folder: Path) -> None:
    assert find(folder).name == "my-model"
    assert find(folder).path == folder
    assert find(folder, name="mine").name == "mine"


def test_sizes_come_from_the_configuration(folder: Path) -> None:
    edit(folder / "unet" / "config.json", sample_size=[8, 24])
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type=None)
    model = find(folder).denoiser
    assert model is not None
    assert (model.default_width, model.default_height, model.prediction_type) == (192, 64, "epsilon")


@pytest.mark.parametrize("side", [1, 7, 9, 17])
def test_the_unet_takes_every_latent_size_of_the_grid(side: int) -> None:
    model = find("shapes").denoiser
    assert model is not None
    unet = UNet2DConditionModel.from_pretrained(SHIPPED / "unet", torch_dtype=torch.float32)
    pixels = side * model.size_multiple
    latents = torch.zeros(1, model.latent_channels, pixels // model.vae_scale_factor, 16)
    with torch.inference_mode():
        out = unet(latents, 1, encoder_hidden_states=torch.zeros(1, 77, unet.config.cross_attention_dim)).sample
    assert out.shape == latents.shape


@pytest.mark.parametrize("source", ["/no/such/folder", "nothing", "./a/b", "model.safetensors", "a/b.ckpt"])
def test_missing_source(source: str) -> None:
    assert "does not exist" in refusal(source)


def test_a_folder_without_an_index(tmp_path: Path) -> None:
    assert "no model_index.json" in refusal(tmp_path)


def test_another_family_is_named(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="KandinskyPipeline")
    assert "is a KandinskyPipeline; this version serves StableDiffusionPipeline, " in refusal(folder)
    edit(folder / "model_index.json", _class_name="FluxPipeline")
    assert "text_encoder_2 is missing; T5EncoderModel is what the flux family has" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("model_index.json", {"unet": ["diffusers", "UNet3DConditionModel"]}, "unet is UNet3DConditionModel"),
        ("model_index.json", {"vae": None}, "vae is missing"),
        ("unet/config.json", {"in_channels": 8}, "8 channels (in_channels)"),
        ("unet/config.json", {"in_channels": 9}, "conv_in.weight has the shape [48, 4, 3, 3]"),
        ("unet/config.json", {"out_channels": 8}, "predicts 8 channels"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type is text_time"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type is timestep"),
        ("unet/config.json", {"time_cond_proj_dim": 64}, "time_embedding.cond_proj.weight"),
        ("unet/config.json", {"quantization_config": {"load_in_4bit": True}}, "quantized"),
        ("unet/config.json", {"sample_size": [1, 2, 3]}, "sample_size"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "trained with"),
        ("scheduler/scheduler_config.json", {"prediction_type": "x0"}, "prediction_type is x0"),
        ("unet/config.json", {"cross_attention_dim": 768}, "768 wide"),
        ("unet/config.json", {"block_out_channels": None}, "block_out_channels"),
        ("unet/config.json", {"block_out_channels": [320, 640]}, "conv_in.weight"),
        ("vae/config.json", {"latent_channels": "four"}, "four"),
        ("vae/config.json", {"latent_channels": 16}, "16 latent channels"),
        ("vae/config.json", {"block_out_channels": [16, 32, 48, 128]}, "encoder.conv_out.weight"),
        ("text_encoder/config.json", {"vocab_size": 49408}, "the text encoder 49408"),
        ("text_encoder/config.json", {"max_position_embeddings": 64}, "64 tokens"),
        ("text_encoder/config.json", {"hidden_size": None}, "hidden_size"),
    ],
)
def test_configurations_that_do_not_fit(folder: Path, file: str, changes: dict[str, object], reason: str) -> None:
    edit(folder / file, **changes)
    assert reason in refusal(folder)


@pytest.mark.parametrize(
    "file", ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]
)
def test_missing_and_broken_configurations(folder: Path, file: str) -> None:
    (folder / file).write_text("{")
    assert f"{file} is not JSON" in refusal(folder)
    (folder / file).unlink()
    assert f"{file} is missing" in refusal(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_and_pickled_weights(folder: Path, part: str) -> None:
    (weights,) = (folder / part).glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    assert "pickled" in refusal(folder)
    weights.with_suffix(".bin").rename(weights.with_suffix(".fp16.safetensors"))
    assert "fp16" in refusal(folder)
    weights.with_suffix(".fp16.safetensors").unlink()
    assert "holds no weights" in refusal(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize(
    ("keep", "reason"),
    [(0, "not a safetensors"), (5, "not a safetensors"), (100, "inside its header"), (-1, "is cut off")],
)
def test_cut_weights(folder: Path, part: str, keep: int, reason: str) -> None:
    (weights,) = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:keep])
    assert reason in refusal(folder)


def test_foreign_weights(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole + b"!")
    assert "foreign bytes" in refusal(folder)
    for garbage in (b"not safetensors at all", struct.pack("<Q", 9) + b"[1,2,3,4]", struct.pack("<Q", 2) + b"{}"):
        weights.write_bytes(garbage)
        assert "not a safetensors file" in refusal(folder)
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", weights)
    assert "something else" in refusal(folder) or "conv_in.weight" in refusal(folder)


def test_sharded_weights(folder: Path) -> None:
    unet = folder / "unet"
    whole = load_file(unet / "diffusion_pytorch_model.safetensors")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(whole)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({key: whole[key] for key in keys}, unet / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert find(folder).family == "sd"
    (unet / "b.safetensors").unlink()
    assert "b.safetensors can't be read" in refusal(folder)


def test_tokenizer_without_json_or_without_anything(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert find(folder).family == "sd"
    (folder / "tokenizer" / "merges.txt").unlink()
    assert "holds neither" in refusal(folder)


def test_tokenizer_with_json_alone(folder: Path) -> None:
    (folder / "tokenizer" / "vocab.json").unlink()
    assert find(folder).family == "sd"


def test_a_hub_id_needs_a_full_commit() -> None:
    for revision in ({}, {"revision": "main"}, {"revision": COMMIT[:7]}):
        assert "40 hex digits" in refusal("someone/some-model", param="model.revision", **revision)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_that_does_not_answer(hub_cache: Path) -> None:
    assert "does not answer" in refusal("someone/some-model", revision=COMMIT)


def test_a_hub_model_that_is_cached_needs_no_hub(hub_cache: Path) -> None:
    shutil.copytree(SHIPPED, hub_cache / "models--someone--some-model" / "snapshots" / COMMIT)
    model = find("someone/some-model", revision=COMMIT)
    assert model.name == "some-model"
    assert model.path.name == COMMIT
