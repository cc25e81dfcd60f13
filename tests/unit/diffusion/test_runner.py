"""The runner's own rules: who fails alone, what changes on the way, what is timed at start."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.image_models import BUILDERS, sd_model
from support.parity import SETTINGS, difference, drawn

from serve.diffusion.run import Work
from serve.diffusion.runner import Runner, open_runner
from serve.domain import Conditioning, Schedule
from serve.errors import GenerationFailed, OperatorError
from serve.models import ModelFolder, check_folder
from serve.settings import DiffusionSettings

MakeWork = Callable[..., Work]


def test_not_a_number_fails_its_row_alone(runner: Runner, work: MakeWork) -> None:
    good = work("good", num_inference_steps=4)
    text = good.schedule.at(0)
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


def test_texts_change_at_their_step(runner: Runner, work: MakeWork) -> None:
    """Phases that say the same are one; a phase that comes after the last step changes nothing; others do."""
    circle, star = work("circle", "a red circle on blue").schedule.at(0), work("star", "a green star").schedule.at(0)
    job = work("scheduled", num_inference_steps=6, scheduler="heun")
    phases = {
        "circle": ((0, circle),),
        "same": ((0, circle), (3, circle)),
        "late": ((0, circle), (6, star)),
        "first": ((0, circle), (1, star)),
        "star": ((0, star),),
    }
    images = {name: drawn(runner, replace(job, schedule=Schedule(each)))[0] for name, each in phases.items()}
    assert difference(images["circle"], images["same"]) == 0
    assert difference(images["circle"], images["late"]) == 0
    assert difference(images["circle"], images["first"]) > 10
    assert difference(images["star"], images["first"]) > 10


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
