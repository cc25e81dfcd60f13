"""The table of published models: what is known of them, what diffusers makes of them, and what a folder tells."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from support.published_folders import published_model

from serve.errors import OperatorError
from serve.memory.flops import decoding, forward
from serve.memory.planner import plan
from serve.memory.shapes import published, shape_of
from serve.models import SHIPPED, resolve
from serve.settings.pools import ModelSettings

ROOT = Path(__file__).parents[3]
MILLIONS = {
    "sd15": (859.5, 83.65),
    "sd21": (865.9, 83.65),
    "sdxl": (2567.5, 83.65),
    "playground-v2.5": (2567.5, 83.65),
    "sd35-medium": (2469.7, 83.82),
    "sd35-large": (8056.6 + 89.7, 83.82),
    "flux-dev": (11901.4, 83.82),
    "flux-schnell": (11891.2, 83.82),
    "pixart-sigma": (610.9, 83.65),
}
"""Of parameters, as the models' authors and the hub tell, denoiser and VAE; SD 3.5 Large's table of positions, which is
no parameter and lies on the card all the same, apart."""


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_are_the_known_ones(name: str) -> None:
    shape = published()[name]
    assert (shape.parameters / 1e6, shape.vae_parameters / 1e6) == pytest.approx(MILLIONS[name], rel=2e-4)


def test_the_parts_of_a_denoiser_are_parts_of_it() -> None:
    for shape in published().values():
        assert 0.98 < (shape.linear + shape.outside) / shape.parameters <= 1  # blocks have little but linear layers
        assert shape.outside + 2 * shape.largest_block < shape.parameters
        assert shape.largest_layer + shape.loose < shape.outside + shape.largest_block


def test_models_know_what_orders_take_of_them() -> None:
    assert {name for name, shape in published().items() if not shape.guided} == {"flux-dev", "flux-schnell"}
    assert published()["sd35-medium"].text_tokens == 77 + 256
    assert published()["flux-dev"].lanes == 1
    assert published()["sd15"].lanes == 2


@pytest.mark.parametrize("name", ["sd15", "sd35-medium", "pixart-sigma"])
def test_a_folder_tells_what_the_table_says(tmp_path: Path, name: str) -> None:
    assert shape_of(published_model(tmp_path, name)) == published()[name]


def test_the_shipped_model_has_a_shape() -> None:
    shape = shape_of(resolve(ModelSettings(source="shapes"), Path()))
    files = [SHIPPED / part / "diffusion_pytorch_model.safetensors" for part in ("unet", "vae")]
    stored = [file.stat().st_size for file in files]
    # Stored in two or four bytes a number, behind headers of a few kilobytes.
    for numbers, size in zip((shape.parameters, shape.vae_parameters), stored, strict=True):
        assert any(0 <= size - numbers * width < 100_000 for width in (2, 4))


@pytest.mark.parametrize(
    ("part", "lacking"),
    [
        ("unet", ("down_block_types", "up_block_types", "layers_per_block", "attention_head_dim")),
        ("vae", ("layers_per_block", "force_upcast", "out_channels")),
    ],
)
def test_a_configuration_may_lack_what_is_as_usual(tmp_path: Path, part: str, lacking: Sequence[str]) -> None:
    """diffusers takes its own defaults then; of the U-Net they are those of Stable Diffusion 1.5."""
    model = resolve(ModelSettings(source=str(shutil.copytree(SHIPPED, tmp_path / "model"))), Path())
    file = model.path / part / "config.json"
    config = json.loads(file.read_text())
    for field in lacking:
        config.pop(field, None)
    if part == "unet":
        config["block_out_channels"] = [320, 640, 1280, 1280]
    file.write_text(json.dumps(config))
    shape = shape_of(model)
    plan(shape, 4e9, ("float16",))
    forward(shape, 128, 128)
    decoding(shape, 128, 128, 1024)
    if part == "unet":
        usual = published()["sd15"].denoiser
        assert [list(shape.denoiser[field]) for field in lacking[:2]] == [usual[field] for field in lacking[:2]]


@pytest.mark.parametrize(
    ("part", "garbled"), [("unet", {"down_block_types": ["DownBlock2D"]}), ("vae", {"layers_per_block": "two"})]
)
def test_a_configuration_that_contradicts_itself_is_one_line(
    tmp_path: Path, part: str, garbled: Mapping[str, object]
) -> None:
    model = resolve(ModelSettings(source=str(shutil.copytree(SHIPPED, tmp_path / "model"))), Path())
    file = model.path / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **garbled}))
    with pytest.raises(OperatorError, match=r"model\.source: .*config\.json garbles a field") as refused:
        shape_of(model)
    assert refused.value.param == "model.source"


@pytest.mark.slow
def test_the_table_is_what_diffusers_makes_of_the_configurations() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "model_facts.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
