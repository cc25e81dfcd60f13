"""Steps, guidance and strength of an order that names none."""

import json
import re
import shutil
from pathlib import Path

import pytest
from support.image_models import sdxl_model

from serve.errors import OperatorError
from serve.models import SHIPPED, check_folder, resolve
from serve.models.defaults import GENERATION_CONFIG, Defaults, defaults
from serve.models.denoiser import Guidance
from serve.settings.pools import ModelSettings

EULER = {"_class_name": "EulerDiscreteScheduler"}


def edit(file: Path, **changes: object) -> None:
    content = (json.loads(file.read_text()) if file.is_file() else {}) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("family", "guidance", "scheduler", "expected"),
    [
        ("sd", "classifier_free", {}, (25, 5.0, 0.8)),
        ("sdxl", "classifier_free", {"_class_name": "EulerDiscreteScheduler"}, (30, 5.0, 0.6)),
        (
            "sdxl",
            "classifier_free",
            {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
            (4, 0.0, 0.6),
        ),
        ("sdxl", "classifier_free", {"_class_name": "EulerAncestralDiscreteScheduler"}, (30, 5.0, 0.6)),
        ("sdxl", "classifier_free", {"_class_name": "EDMDPMSolverMultistepScheduler"}, (50, 3.0, 0.6)),
        ("sdxl", "classifier_free", {"_class_name": "LCMScheduler"}, (4, 1.0, 0.6)),
        ("sdxl", "embedded", {"_class_name": "LCMScheduler"}, (4, 8.5, 0.6)),
        ("sdxl_refiner", "classifier_free", {}, (30, 5.0, 0.3)),
        ("sd3", "classifier_free", {}, (28, 4.5, 0.6)),
        ("flux", "embedded", {}, (28, 3.5, 0.6)),
        ("flux", "none", {}, (4, 0.0, 0.6)),
        ("sd", "classifier_free", EULER | {"timestep_spacing": "trailing"}, (4, 0.0, 0.8)),
        ("sd", "classifier_free", EULER, (25, 5.0, 0.8)),
        (
            "sd",
            "classifier_free",
            EULER | {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
            (25, 5.0, 0.8),
        ),
        ("pixart", "classifier_free", {}, (20, 4.5, 0.6)),
        ("auraflow", "classifier_free", {}, (50, 3.5, 0.6)),
    ],
)
def test_defaults_of_each_kind(
    family: str, guidance: Guidance, scheduler: dict[str, str], expected: tuple[int, float, float], tmp_path: Path
) -> None:
    assert defaults(tmp_path, "some", family, guidance, scheduler) == Defaults(*expected)


@pytest.mark.parametrize(
    ("name", "family", "guidance", "expected"),
    [
        ("sdxl-turbo", "sdxl", "classifier_free", (4, 0.0, 0.6)),
        ("juggernautXL_v9Rdphoto2Lightning", "sdxl", "classifier_free", (4, 0.0, 0.6)),
        ("Hyper-SD15-4steps", "sd", "classifier_free", (4, 0.0, 0.8)),
        ("realvisxlV40_HyperBakedvae", "sdxl", "classifier_free", (4, 0.0, 0.6)),
        ("stable-diffusion-3.5-large-turbo", "sd3", "classifier_free", (4, 0.0, 0.6)),
        ("hyperrealism_v3", "sd", "classifier_free", (25, 5.0, 0.8)),
        ("FLUX.1-Turbo", "flux", "embedded", (28, 3.5, 0.6)),
    ],
)
def test_a_distilled_model_is_told_by_its_name(
    name: str, family: str, guidance: Guidance, expected: tuple[int, float, float], tmp_path: Path
) -> None:
    assert defaults(tmp_path, name, family, guidance, {}) == Defaults(*expected)


def test_the_name_that_tells_is_the_sources(tmp_path: Path) -> None:
    """Not the one that the model is served under; settings and the model's own file still win."""
    folder = sdxl_model(tmp_path / "SDXL-Lightning")

    def chosen(**settings: object) -> tuple[str, int, float]:
        model = resolve(ModelSettings.model_validate({"source": str(folder), **settings}), tmp_path)
        assert model.denoiser is not None
        return model.name, model.denoiser.default_num_inference_steps, model.denoiser.default_guidance_scale

    assert chosen() == ("SDXL-Lightning", 4, 0.0)
    assert chosen(name="fast", num_inference_steps=8) == ("fast", 8, 0.0)
    edit(folder / GENERATION_CONFIG, guidance_scale=1.5)
    assert chosen(name="fast") == ("fast", 4, 1.5)
    shutil.move(folder, tmp_path / "sdxl")
    folder = tmp_path / "sdxl"
    (folder / GENERATION_CONFIG).unlink()
    assert chosen(name="turbo") == ("turbo", 30, 5.0)


def test_defaults_come_from_settings_then_from_the_model_then_from_its_kind(tmp_path: Path) -> None:
    folder = sdxl_model(tmp_path / "sdxl")

    def chosen(**settings: float) -> tuple[int, float, float]:
        denoiser = resolve(ModelSettings(source=str(folder), **settings), tmp_path).denoiser
        assert denoiser is not None
        return denoiser.default_num_inference_steps, denoiser.default_guidance_scale, denoiser.default_strength

    assert chosen() == (30, 5.0, 0.6)
    edit(folder / GENERATION_CONFIG, num_inference_steps=8, guidance_scale=2, strength=0.5, transformers_version="5")
    assert chosen() == (8, 2.0, 0.5)
    assert chosen(guidance_scale=0.0) == (8, 0.0, 0.5)
    assert chosen(num_inference_steps=3, guidance_scale=1.5) == (3, 1.5, 0.5)
    edit(folder / GENERATION_CONFIG, guidance_scale=None, strength=None)
    assert chosen() == (8, 5.0, 0.6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num_inference_steps", value) for value in ("20", 0, -1, 2.5, True, [1], float("nan"))),
        *(("guidance_scale", value) for value in ("5", -0.5, True, [1], {}, float("nan"), float("inf"))),
        *(("strength", value) for value in ("1", 0, 1.01, True, [1], float("nan"))),
    ],
)
def test_a_file_of_defaults_that_is_garbled(tmp_path: Path, field: str, value: object) -> None:
    folder = Path(shutil.copytree(SHIPPED, tmp_path / "sd"))
    edit(folder / GENERATION_CONFIG, **{field: value})
    with pytest.raises(OperatorError, match=re.escape(f"{GENERATION_CONFIG}: {field} is {value}, not a number")):
        check_folder(folder, "some")
    (folder / GENERATION_CONFIG).write_text("[]")
    with pytest.raises(OperatorError, match=f"{GENERATION_CONFIG} holds no settings"):
        check_folder(folder, "some")
