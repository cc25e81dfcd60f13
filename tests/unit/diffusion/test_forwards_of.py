"""The forward passes of every sampler, as costs are predicted by them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.image_models import playground_model, sd3_model

from serve.diffusion.runner import Runner, open_runner
from serve.diffusion.samplers import Track
from serve.domain.orders import ImageRequest
from serve.jobs.records import steps_of
from serve.models import check_folder
from serve.models.samplers import forwards_of, sampler_names
from serve.settings.pools import DiffusionSettings


@pytest.fixture(scope="module", params=["diffusion", "flow", "edm"])
def drawing(request: pytest.FixtureRequest, runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A runner of a model of each kind."""
    if request.param == "diffusion":
        return runner
    make: Callable[[Path], Path] = sd3_model if request.param == "flow" else playground_model
    folder = make(tmp_path_factory.mktemp(request.param))
    return open_runner(check_folder(folder, request.param), DiffusionSettings(device="cpu", torch_threads=1))


def test_forward_passes_are_predicted(drawing: Runner) -> None:
    denoiser = drawing.family.model.denoiser
    assert denoiser is not None
    side = denoiser.default_width
    shape = (side // denoiser.vae_scale_factor, side // denoiser.vae_scale_factor)
    for scheduler in (None, *sampler_names(denoiser.process)):
        for steps in (2, 3, 10, 21):
            for strength in (None, 0.5, 1.0):
                request = ImageRequest(
                    model=drawing.family.model.name,
                    prompt="",
                    width=side,
                    height=side,
                    num_inference_steps=steps,
                    guidance_scale=5.0,
                    seed=1,
                    scheduler=scheduler,
                    image=None if strength is None else "a/image",
                    strength=strength,
                )
                made = Track(drawing.family, request, shape).forwards
                told = forwards_of(scheduler, steps_of(request))
                # The samplers of flow round the steps that are left out, the others those that are made.
                slack = 2 if denoiser.process == "flow" and strength == 0.5 else 0
                assert abs(made - told) <= slack, (scheduler, steps, strength)
