"""The image side of model folders of every family: what is read from configurations and headers, what is refused."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.image_models import BUILDERS, flux_model, sd3_model, sd_model, sdxl_model

from serve.domain.orders import Task
from serve.errors import OperatorError
from serve.models import SHIPPED, Denoiser, check_folder
from serve.models.defaults import GENERATION_CONFIG
from serve.models.denoiser_configs import KINDS, Config, Reading
from serve.models.image_parts import image_parts
from serve.models.samplers import sampler_names
from serve.models.sources import configuration_files, hub_files
from serve.models.text_parts import CLASSES, class_of

WEIGHTS = "diffusion_pytorch_model.safetensors"
EVERY_TASK = frozenset(Task)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One whole small model of each family, which no test may spoil."""
    root = tmp_path_factory.mktemp("models")
    return {family: build(root / family) for family, build in BUILDERS.items()}


@pytest.fixture(params=list(BUILDERS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(built: dict[str, Path], family: str, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(built[family], tmp_path / family))


def read(folder: Path) -> Denoiser:
    denoiser = check_folder(folder, "some").denoiser
    assert denoiser is not None
    return denoiser


def refusal(folder: Path) -> str:
    with pytest.raises(OperatorError) as raised:
        check_folder(folder, "some")
    assert raised.value.param == "model.source"
    assert raised.value.message.startswith("model.source: ")
    assert "\n" not in raised.value.message
    return raised.value.message


def edit(file: Path, **changes: object) -> None:
    content = (json.loads(file.read_text()) if file.is_file() else {}) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(part: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(part / WEIGHTS)
    change(tensors)
    save_file(tensors, part / WEIGHTS)


def reading(folder: Path, family: str) -> Reading:
    part = folder / KINDS[family].part
    return KINDS[family].read(Config(part, json.loads((part / "config.json").read_text())), family)


def spellings(name: str, tensors: dict[str, torch.Tensor]) -> list[str]:
    return [key for key in tensors if key == name or (name[0] == "." and key.endswith(name))]


def test_what_is_known_of_each_family(built: dict[str, Path]) -> None:
    facts = {family: read(folder) for family, folder in built.items()}
    for family, denoiser in facts.items():
        assert check_folder(built[family], family).family == family
        assert denoiser.vae_scale_factor == 4
        assert denoiser.size_multiple == 8
        assert denoiser.in_channels == denoiser.latent_channels
        assert denoiser.process == KINDS[family].process
    assert {family: denoiser.tasks for family, denoiser in facts.items()} == {
        "sd": EVERY_TASK,
        "sdxl": EVERY_TASK,
        "sdxl_refiner": {Task.IMG2IMG, Task.INPAINT},
        "sd3": EVERY_TASK,
        "flux": EVERY_TASK,
        "pixart": {Task.TXT2IMG},
        "auraflow": {Task.TXT2IMG},
    }
    assert (facts["sd"].default_width, facts["sd"].prediction_type, facts["sd"].largest_side) == (64, "epsilon", None)
    assert (facts["sd3"].default_width, facts["sd3"].prediction_type) == (64, "flow_prediction")
    assert (facts["sd3"].largest_side, facts["sd3"].latent_channels) == (24 * 2 * 4, 8)
    assert (facts["flux"].default_width, facts["flux"].guidance, facts["flux"].largest_side) == (512, "embedded", None)


def test_variants(tmp_path: Path) -> None:
    assert read(sd_model(tmp_path / "v", prediction_type="v_prediction")).prediction_type == "v_prediction"
    for inpaints in (sd_model(tmp_path / "sd9", in_channels=9), sdxl_model(tmp_path / "sdxl9", in_channels=9)):
        denoiser = read(inpaints)
        assert (denoiser.in_channels, denoiser.latent_channels) == (9, 4)
        assert denoiser.tasks == {Task.INPAINT}
    schnell = read(flux_model(tmp_path / "schnell", guidance_embeds=False))
    assert (schnell.guidance, schnell.default_num_inference_steps, schnell.default_guidance_scale) == ("none", 4, 0.0)
    assert read(sd3_model(tmp_path / "sd3", with_t5=False, dual_attention=False)).largest_side == 192


def test_pipelines_that_differ_in_what_they_do_are_one_family(built: dict[str, Path], tmp_path: Path) -> None:
    for family, pipeline in (
        ("sd", "StableDiffusionInpaintPipeline"),
        ("sdxl", "StableDiffusionXLInpaintPipeline"),
        ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
    ):
        folder = Path(shutil.copytree(built[family], tmp_path / pipeline))
        edit(folder / "model_index.json", _class_name=pipeline)
        assert check_folder(folder, "some").family == family
        assert read(folder).tasks == EVERY_TASK


def test_latent_consistency_reads_its_guidance(built: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built["sd"], tmp_path / "lcm"))
    edit(folder / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    edit(folder / "unet" / "config.json", time_cond_proj_dim=32)
    assert "time_embedding.cond_proj.weight" in refusal(folder)
    edit_tensors(folder / "unet", lambda all_: all_.update({"time_embedding.cond_proj.weight": torch.zeros(16, 32)}))
    denoiser = read(folder)
    assert (denoiser.guidance, denoiser.default_num_inference_steps, denoiser.default_guidance_scale) == (
        "embedded",
        4,
        8.5,
    )


def test_noise_levels_without_a_schedule(built: dict[str, Path], tmp_path: Path) -> None:
    """Playground v2.5 has samplers of its own."""
    folder = Path(shutil.copytree(built["sdxl"], tmp_path / "edm"))
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="EDMDPMSolverMultistepScheduler")
    denoiser = read(folder)
    assert denoiser.process == "edm"
    assert sampler_names(denoiser.process) == ("edm_dpmpp_2m", "edm_euler")


def test_every_telling_tensor_is_told_by_its_absence(folder: Path, family: str) -> None:
    part = folder / KINDS[family].part
    whole = load_file(part / WEIGHTS)
    for name in reading(folder, family).tensors:
        save_file({key: value for key, value in whole.items() if key not in spellings(name, whole)}, part / WEIGHTS)
        assert f"they have no {name.lstrip('.')}" in refusal(folder)


def test_every_telling_tensor_has_its_shape(folder: Path, family: str) -> None:
    part = folder / KINDS[family].part
    whole = load_file(part / WEIGHTS)
    for name in reading(folder, family).tensors:
        full = spellings(name, whole)[0]
        save_file(whole | {full: whole[full].repeat([1] * (whole[full].ndim - 1) + [2])}, part / WEIGHTS)
        assert f"{full} has the shape" in refusal(folder)
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in whole.items()}, part / WEIGHTS)
    assert "is stored as F8_E4M3" in refusal(folder)


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.conv_in.weight"])
def test_a_vae_without_one_of_its_halves(folder: Path, name: str) -> None:
    edit_tensors(folder / "vae", lambda tensors: tensors.pop(name))
    assert f"they have no {name}" in refusal(folder)


def test_weights_of_another_family(built: dict[str, Path], folder: Path, family: str) -> None:
    for other in built:
        if family.startswith("sd") != other.startswith("sd") or (family != other and "sd3" in (family, other)):
            shutil.copy(built[other] / KINDS[other].part / WEIGHTS, folder / KINDS[family].part / WEIGHTS)
            message = refusal(folder)
            assert "something else" in message or "has the shape" in message


def test_another_class_of_denoiser_or_vae(folder: Path, family: str) -> None:
    part = KINDS[family].part
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    assert "its vae is AutoencoderTiny" in refusal(folder)
    edit(folder / "model_index.json", **{part: ["diffusers", "SomethingElse"]})
    assert f"its {part} is SomethingElse; {KINDS[family].cls} is what the {family} family has" in refusal(folder)
    edit(folder / "model_index.json", **{part: None})
    assert f"its {part} is missing" in refusal(folder)


def test_pixart_as_older_versions_of_diffusers_wrote_it(built: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(built["pixart"], tmp_path / "old")
    edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    assert check_folder(folder, "old").denoiser is not None


def test_a_part_that_is_cut_off_or_pickled_or_not_there(folder: Path, family: str) -> None:
    weights = folder / KINDS[family].part / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert "is cut off" in refusal(folder)
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(b"\x80\x04")
    assert "is pickled" in refusal(folder)
    (weights.parent / "config.json").unlink()
    assert "config.json is missing" in refusal(folder)


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("sd", "block_out_channels"),
        ("sd", "cross_attention_dim"),
        ("sdxl", "projection_class_embeddings_input_dim"),
        ("sdxl", "addition_time_embed_dim"),
        ("sd3", "pos_embed_max_size"),
        ("sd3", "num_layers"),
        ("flux", "num_single_layers"),
        ("flux", "in_channels"),
    ],
)
@pytest.mark.parametrize("value", [None, 0, -4, "four", 2.5, True, {}, []])
def test_numbers_that_are_missing_or_garbled(folder: Path, family: str, field: str, value: object) -> None:
    edit(folder / KINDS[family].part / "config.json", **{field: value})
    assert f"lacks or garbles {field}" in refusal(folder)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("sdxl", {"addition_time_embed_dim": 16}, "projection_class_embeddings_input_dim is 76, the model's text"),
        ("sdxl", {"addition_embed_type": None}, "addition_embed_type is None; text_time is"),
        ("sd3", {"pooled_projection_dim": 77}, "pooled_projection_dim is 77, the model's text gives 48"),
        ("sd3", {"sample_size": 64}, "sample_size is more than pos_embed_max_size has positions for"),
        ("auraflow", {"sample_size": 512}, "sample_size is more than pos_embed_max_size has positions for"),
        ("sd3", {"in_channels": 16}, "16 channels (in_channels); with the VAE's 8 latent channels 8 is"),
        ("flux", {"pooled_projection_dim": 77}, "pooled_projection_dim is 77, the model's text gives 32"),
        ("flux", {"joint_attention_dim": 80}, "reads text 80 wide (joint_attention_dim), its text is 96 wide"),
        ("flux", {"in_channels": 64, "out_channels": 32}, "16 channels (in_channels)"),
        ("flux", {"in_channels": 34}, "not 2 x 2 latents"),
        ("flux", {"patch_size": 2}, "patch_size is 2; 1 is what is served"),
        ("sdxl_refiner", {"projection_class_embeddings_input_dim": 99}, "input_dim is 99, the model's text gives"),
        ("pixart", {"caption_channels": 80}, "reads text 80 wide (caption_channels), its text is 96 wide"),
        ("pixart", {"out_channels": 5}, "its out_channels are 5, its in_channels 4"),
        ("auraflow", {"joint_attention_dim": 80}, "reads text 80 wide (joint_attention_dim), its text is 96 wide"),
        ("flux", {"quantization_config": {"quant_method": "bitsandbytes"}}, "weights are quantized"),
    ],
)
def test_parts_that_do_not_fit_each_other(folder: Path, family: str, changes: dict[str, object], reason: str) -> None:
    edit(folder / KINDS[family].part / "config.json", **changes)
    assert reason in refusal(folder)


def test_a_sampler_of_the_other_process(folder: Path, family: str) -> None:
    flow = KINDS[family].process == "flow"
    other = "EulerDiscreteScheduler" if flow else "FlowMatchEulerDiscreteScheduler"
    edit(folder / "scheduler" / "scheduler_config.json", _class_name=other)
    assert f"a {other} is not what the {family} family was trained with" in refusal(folder)


def published(family: str, **config: object) -> tuple[tuple[int, int], int | None, int]:
    read = KINDS[family].read(Config(Path(family), config), family)
    return read.height_width, read.largest_side, read.in_channels


def test_configurations_that_everybody_has() -> None:
    """Fields as published models have them; what no field gives is diffusers' own default."""
    unet = {"in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280]}
    assert published("sd", **unet, cross_attention_dim=768, sample_size=64) == ((64, 64), None, 4)
    assert published("sd", **unet, cross_attention_dim=768) == ((64, 64), None, 4)
    xl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "cross_attention_dim": 2048}
    xl |= unet | {"block_out_channels": [320, 640, 1280], "projection_class_embeddings_input_dim": 2816}
    assert published("sdxl", **xl, sample_size=128) == ((128, 128), None, 4)
    mmdit = {"attention_head_dim": 64, "caption_projection_dim": 1536, "in_channels": 16, "joint_attention_dim": 4096}
    mmdit |= {"num_attention_heads": 24, "num_layers": 24, "out_channels": 16, "patch_size": 2, "sample_size": 128}
    mmdit |= {"pooled_projection_dim": 2048}
    assert published("sd3", **mmdit, pos_embed_max_size=192) == ((128, 128), 384, 16)
    flux = {"attention_head_dim": 128, "guidance_embeds": True, "in_channels": 64, "joint_attention_dim": 4096}
    flux |= {"num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "patch_size": 1}
    assert published("flux", **flux, pooled_projection_dim=768) == ((128, 128), None, 16)
    pixart = {"attention_head_dim": 72, "caption_channels": 4096, "in_channels": 4, "num_attention_heads": 16}
    pixart |= {"num_layers": 28, "out_channels": 8, "patch_size": 2}
    assert published("pixart", **pixart, sample_size=128) == ((128, 128), None, 4)
    aura = {"attention_head_dim": 256, "caption_projection_dim": 3072, "in_channels": 4, "joint_attention_dim": 2048}
    aura |= {"num_attention_heads": 12, "num_mmdit_layers": 4, "num_single_dit_layers": 32, "out_channels": 4}
    assert published("auraflow", **aura, patch_size=2, pos_embed_max_size=9216, sample_size=64) == (
        (64, 64),
        192,
        4,
    )


def test_the_hub_is_asked_for_the_image_side_of_every_family() -> None:
    """As lists of files on the hub read; what is not needed is not fetched."""
    needed = [
        "model_index.json",
        GENERATION_CONFIG,
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    spare = [
        "flux1-dev.safetensors",
        "ae.safetensors",
        "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/model.safetensors",
        "vae_1_0/diffusion_pytorch_model.safetensors",
    ]
    for roles in CLASSES.values():
        assert list(filter_repo_objects([*needed, *spare], allow_patterns=hub_files(roles, False))) == needed
    rest = configuration_files(["vae"])
    fetched = filter_repo_objects([*needed, *spare], allow_patterns=rest)
    assert [name for name in fetched if name.endswith(".safetensors")] == ["vae/diffusion_pytorch_model.safetensors"]


def test_a_default_that_is_off_the_grid_is_not_one(built: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built["sd"], tmp_path / "sd"))
    edit(folder / "unet" / "config.json", sample_size=[1, 27])
    assert (read(folder).default_width, read(folder).default_height) == (104, 8)


FIELDS = {
    "model_index.json": ["unet", "transformer", "vae", "scheduler", "text_encoder", "_class_name"],
    "scheduler/scheduler_config.json": ["_class_name", "prediction_type", "timestep_spacing"],
    "vae/config.json": ["block_out_channels", "latent_channels"],
    GENERATION_CONFIG: ["num_inference_steps", "guidance_scale", "strength"],
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def accepted(folder: Path) -> bool:
    try:
        check_folder(folder, "some")
    except OperatorError:
        return False
    return True


@given(data=st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_whatever_a_configuration_says_is_read_or_refused(built: dict[str, Path], data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(sorted(built)))
    denoiser = f"{KINDS[family].part}/config.json"
    fields = FIELDS | {denoiser: sorted(json.loads((built[family] / denoiser).read_text()))}
    name = data.draw(st.sampled_from(sorted(fields)))
    field, value = data.draw(st.sampled_from(fields[name])), data.draw(JSON)
    file = built[family] / name
    before = file.read_text() if file.is_file() else None
    try:
        edit(file, **{field: value})
        with nullcontext() if accepted(built[family]) else pytest.raises(OperatorError, match=r"\Amodel\.source: .+\Z"):
            found = read(built[family])
            assert found.default_width % found.size_multiple == 0
    finally:
        file.unlink() if before is None else file.write_text(before)


def test_the_grid_follows_patches_and_the_vae(built: dict[str, Path], tmp_path: Path) -> None:
    """The shipped model's VAE has a factor of 8, which makes 16 of patches of 2."""
    folder = Path(shutil.copytree(built["sd3"], tmp_path / "sd3"))
    shutil.rmtree(folder / "vae")
    shutil.copytree(SHIPPED / "vae", folder / "vae")
    edit(folder / "transformer" / "config.json", in_channels=4, out_channels=4)
    whole = load_file(folder / "transformer" / WEIGHTS)
    for name, keep in (("pos_embed.proj.weight", (48, 4, 2, 2)), ("proj_out.weight", (16, 48))):
        whole[name] = torch.zeros(keep)
    save_file(whole, folder / "transformer" / WEIGHTS)
    denoiser = read(folder)
    assert (denoiser.size_multiple, denoiser.default_width, denoiser.largest_side) == (16, 128, 384)
    model = check_folder(folder, "some")
    index = json.loads((folder / "model_index.json").read_text())
    assert class_of(index, "transformer") == KINDS["sd3"].cls
    assert image_parts(folder, "some", "sd3", index, model.text, model.context_width) == denoiser
