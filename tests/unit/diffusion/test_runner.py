"""The runner's own rules: who fails alone, what changes on the way, what is timed at start."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.image_models import BUILDERS, sd_model
from support.parity import SETTINGS, difference, drawn

from serve.diffusion.run import Work
from serve.diffusion.runner import Latents, Runner, open_runner
from serve.domain.conditioning import Conditioning, Schedule
from serve.encoders.export import conditioning_at
from serve.errors import DeviceLost, GenerationFailed, OperatorError
from serve.models import ModelFolder, check_folder
from serve.settings.pools import DiffusionSettings

MakeWork = Callable[..., Work]


def test_not_a_number_fails_its_row_alone(runner: Runner, work: MakeWork) -> None:
    good = work("good", num_inference_steps=4)
    text = conditioning_at(good.schedule, 0)
    poison = Schedule.constant(Conditioning(torch.full_like(text.positive, torch.nan), text.negative))
    rows = []
    for each in (good, replace(good, run_id="bad", schedule=poison)):
        rows += runner.rows(each)
        runner.begin(rows[-1], each, None)
    failed = runner.step(rows)
    assert [row.run_id for row in failed] == ["bad"]
    assert isinstance(failed[rows[1]], GenerationFailed)
    runner.drop(rows[1:])
    for _ in range(3):
        assert not runner.step(rows[:1])
    assert difference(runner.decode(runner.release(rows[0])), drawn(runner, good)[0]) <= 1


def test_an_image_to_start_from_must_be_there(runner: Runner, work: MakeWork) -> None:
    job = work("gone")
    missing = replace(job, request=replace(job.request, image="image", strength=0.5))
    with pytest.raises(GenerationFailed, match="missing"):
        runner.encode(missing)
    with pytest.raises(GenerationFailed, match="missing"):
        runner.begin(runner.rows(missing)[0], missing, None)


def test_guided_images_take_two_lanes(runner: Runner, work: MakeWork) -> None:
    guided, free = work("guided", num_images=2), work("free", guidance_scale=1.0)
    assert [row.lanes for job in (guided, free) for row in runner.rows(job)] == [2, 2, 1]


@pytest.mark.parametrize("family", [*BUILDERS, "inpainting"])
def test_a_step_of_every_family_is_timed(tmp_path: Path, family: str) -> None:
    folder = tmp_path / family
    path = sd_model(folder, in_channels=9) if family == "inpainting" else BUILDERS[family](folder)
    assert open_runner(check_folder(path, family), SETTINGS).measure((8, 12), 3) > 0


def test_a_dtype_that_the_device_has_not_is_refused(model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("not implemented for Half")

    monkeypatch.setattr(torch.nn.functional, "layer_norm", broken)
    with pytest.raises(OperatorError, match="float16") as refused:
        open_runner(model, DiffusionSettings(device="cpu", dtype="float16", torch_threads=1))
    assert refused.value.param == "diffusion.dtype"


def test_pixels_are_rounded_as_diffusers_does(runner: Runner, work: MakeWork) -> None:
    image = np.asarray(drawn(runner, work("pixels", num_inference_steps=2))[0])
    assert image.shape == (128, 128, 3)
    assert image.dtype == np.uint8


def finished(runner: Runner, job: Work) -> Latents:
    row = runner.rows(job)[0]
    runner.begin(row, job, None)
    for _ in range(row.steps):
        assert not runner.step([row])
    return runner.release(row)


def test_16_bits_are_the_same_picture_more_finely(runner: Runner, work: MakeWork) -> None:
    latents = finished(runner, work("fine", num_inference_steps=2, bit_depth=16))
    fine, image = runner.decode(latents), runner.decode(replace(latents, bit_depth=8))
    assert isinstance(fine, np.ndarray)
    assert (fine.shape, fine.dtype) == ((128, 128, 3), np.uint16)
    assert np.abs(fine / 257 - np.asarray(image)).max() <= 0.5 + 1 / 257
    pixels = runner.family.vae.decode(latents.tensor)
    exact = (pixels.permute(1, 2, 0).double().numpy() / 2 + 0.5).clip(0, 1) * 65535
    assert np.abs(fine - exact).max() <= 0.51
    assert len(np.unique(fine)) > 256


def test_tiles_are_asked_for_after_running_out_of_memory(runner: Runner, work: MakeWork) -> None:
    latents = finished(runner, work("tiled", num_inference_steps=2))
    whole, tiled = (np.asarray(runner.decode(latents, each), dtype=float) for each in (None, 64))
    assert 0 < np.abs(whole - tiled).mean() < 12
    assert whole.shape == tiled.shape


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), RuntimeError("some"), TypeError("other")])
def test_what_fails_after_the_rows_have_moved_fails_all_of_them(
    runner: Runner, work: MakeWork, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry would move them twice."""
    job = work("moved", num_images=2, num_inference_steps=3)
    rows = runner.rows(job)
    for row in rows:
        runner.begin(row, job, None)

    def broken(*_: object) -> torch.Tensor:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "isfinite", broken)
        assert runner.step(rows).keys() == set(rows)
        patched.setattr(torch.Tensor, "isfinite", lost)
        with pytest.raises(DeviceLost):
            runner.step(rows)
    runner.drop(rows)


def lost(*_: object) -> torch.Tensor:
    raise torch.AcceleratorError("gone")


def test_a_measurement_waits_for_the_device(
    runner: Runner, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    runner._synchronize()
    assert not waited
    for name in ("mps", "cuda"):
        monkeypatch.setattr(runner.family, "device", torch.device(name))
        runner._synchronize()
    assert waited == ["mps", torch.device("cuda")]


@pytest.mark.parametrize("name", ["LMSDiscreteScheduler", "DPMSolverSDEScheduler"])
def test_a_sampler_whose_library_is_not_here_is_refused(tmp_path: Path, name: str) -> None:
    folder = sd_model(tmp_path / "sd")
    for file, key, value in (
        ("model_index.json", "scheduler", ["diffusers", name]),
        ("scheduler/scheduler_config.json", "_class_name", name),
    ):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {key: value}))
    with pytest.raises(OperatorError, match=name) as refused:
        open_runner(check_folder(folder, "sd"), SETTINGS)
    assert refused.value.param == "model.source"
    assert "\n" not in refused.value.message
