"""Whatever steps together, every image is the one that it would be alone: random mixes, through the whole engine."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from PIL import Image
from support.image_models import flux_model, sd3_model, sd_model, sdxl_model
from support.parity import difference, drawn, hole, picture

from serve.diffusion.engine import Engine, Work
from serve.diffusion.profile import Profile
from serve.diffusion.runner import Runner, open_runner
from serve.diffusion.scheduler import StepScheduler
from serve.domain import Conditioning, ImageRequest, Schedule, Task
from serve.models import ModelFolder, check_folder
from serve.models.samplers import sampler_names
from serve.settings import DiffusionSettings
from serve.telemetry.metrics import InProcessMetrics

MakeWork = Callable[..., Work]
LONG = "a green star, " * 30 + "a small red circle"
"""Of more than one row of tokens: its context is longer than the others'."""

slow = partial(settings, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sources = st.sampled_from(["none", "image", "mask"])
common = {
    "num_inference_steps": st.integers(2, 7),
    "seed": st.integers(0, 2**32 - 2),
    "strength": st.sampled_from([0.35, 0.7, 1.0]),
    "source": sources,
    "cancelled": st.integers(0, 9).map(lambda n: n == 0),
}


def run_together(runner: Runner, jobs: Sequence[Work], leaving: set[str], max_batch_size: int) -> dict[str, Any]:
    """Every job's images through one engine, while those that leave are cancelled after their first step."""
    profile = Profile(max_batch_size)
    engine = Engine(Runner(runner.family), StepScheduler(profile), profile, InProcessMetrics())
    futures = {}
    for job in jobs:
        on_step = (lambda event: engine.cancel(event.run_id)) if job.run_id in leaving else (lambda event: None)
        futures[job.run_id] = engine.submit(job, on_step)
    engine.stop()
    return {name: future.result() for name, future in futures.items() if name not in leaving}


def check(runner: Runner, jobs: Sequence[Work], leaving: set[str], max_batch_size: int) -> None:
    mixed = run_together(runner, jobs, leaving, max_batch_size)
    for job in jobs:
        if job.run_id not in leaving:
            solo = drawn(runner, job)
            assert len(solo) == len(mixed[job.run_id].images)
            for one, other in zip(mixed[job.run_id].images, solo, strict=True):
                assert difference(one, other) <= 1, job.request


def inputs(values: dict[str, Any], grid: Callable[[int, int], Image.Image] = picture) -> dict[str, Any]:
    """`source` as the images that a job starts from, with its strength."""
    source, size = values.pop("source"), (values["width"], values["height"])
    if source == "none":
        values["strength"] = None
        return {}
    return {"image": grid(*size), "mask": hole(*size) if source == "mask" else None}


sd_jobs = st.fixed_dictionaries(
    common
    | {
        "prompt": st.sampled_from(["a red circle on a blue background", "a pink heart on black", LONG]),
        "negative_prompt": st.sampled_from(["", "yellow", LONG]),
        "then": st.sampled_from([None, "a white square", LONG]),
        "guidance_scale": st.sampled_from([0.0, 1.0, 2.5, 7.0]),
        "scheduler": st.sampled_from([None, *sampler_names("diffusion")]),
        "num_images": st.integers(1, 2),
        "width": st.sampled_from([64, 96]),
        "height": st.sampled_from([64, 128]),
    }
)


def scheduled(work: MakeWork, job: Work, then: str | None) -> Work:
    """The job with another prompt from its second step on, and its own again for the last."""
    if then is None:
        return job
    text = job.request.text
    other = work("", then, negative_prompt=text.negative_prompt or "", guidance_scale=job.request.guidance_scale)
    first, second = job.schedule.at(0), other.schedule.at(0)
    last = max(2, job.request.num_inference_steps - 1)
    return replace(job, schedule=Schedule(((0, first), (1, second), (last, first))))


@slow(max_examples=10)
@given(mix=st.lists(sd_jobs, min_size=2, max_size=7), max_batch_size=st.sampled_from([2, 4, 8]))
def test_the_shipped_model(runner: Runner, work: MakeWork, mix: list[dict[str, Any]], max_batch_size: int) -> None:
    jobs, leaving = [], set()
    for number, order in enumerate(mix):
        values = dict(order)
        then, name = values.pop("then"), f"job{number}"
        if values.pop("cancelled"):
            leaving.add(name)
        jobs.append(scheduled(work, work(name, **inputs(values), **values), then))
    check(runner, jobs, leaving, max_batch_size)


small_jobs = st.fixed_dictionaries(
    common
    | {
        "guidance": st.sampled_from([1.0, 4.0]),
        "embedded": st.sampled_from([0.0, 3.5]),
        "sampler": st.integers(0, 99),
        "num_images": st.integers(1, 2),
        "width": st.sampled_from([32, 48]),
        "height": st.sampled_from([32, 64]),
        "tokens": st.sampled_from([9, 16]),
        "negative_tokens": st.sampled_from([9, 16]),
    }
)


def inpaint_model(path: Path) -> Path:
    """An inpainting U-Net, which reads nine channels."""
    return sd_model(path, in_channels=9)


@pytest.fixture(scope="module", params=[sdxl_model, inpaint_model, sd3_model, flux_model])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = request.param(tmp_path_factory.mktemp("small") / request.param.__name__)
    model = check_folder(folder, folder.name)
    return open_runner(model, DiffusionSettings(device="cpu", torch_threads=1))


def made_up_work(model: ModelFolder, name: str, order: dict[str, Any]) -> Work:
    """A job whose text is made up."""
    assert model.denoiser is not None
    values = dict(order)
    samplers = [None, *sampler_names(model.denoiser.process)]
    values["scheduler"] = samplers[values.pop("sampler") % len(samplers)]
    if model.denoiser.tasks == {Task.INPAINT}:
        values["source"] = "mask"
    generator = torch.Generator().manual_seed(values["seed"])
    guided = values.pop("guidance")
    tokens, negative_tokens = values.pop("tokens"), values.pop("negative_tokens")
    width = model.context_width
    projections = [part.projection or part.width for part in model.text if part.kind != "t5"]
    pooled = {"sd": 0, "sdxl": projections[-1], "sd3": sum(projections), "flux": projections[0]}[model.family]
    if model.family == "flux":
        values |= {"true_cfg_scale": guided, "guidance_scale": values.pop("embedded")}
    else:
        values |= {"guidance_scale": guided}
        values.pop("embedded")

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    has_negative = guided > 1
    ids = torch.tensor([values["height"], values["width"], 0.0, 0.0, values["height"], values["width"]])
    conditioning = Conditioning(
        positive=normal(tokens, width),
        negative=normal(negative_tokens, width) if has_negative else None,
        pooled=normal(pooled) if pooled else None,
        negative_pooled=normal(pooled) if pooled and has_negative else None,
        time_ids=ids if model.family == "sdxl" else None,
        negative_time_ids=ids if model.family == "sdxl" and has_negative else None,
    )
    started = inputs(values)
    kept = {key: None if each is None else f"{name}/{key}.png" for key, each in started.items()}
    request = ImageRequest(model=model.name, prompt="", **values, **kept)
    return Work(name, request, Schedule.constant(conditioning), started.get("image"), started.get("mask"))


@slow(max_examples=8)
@given(mix=st.lists(small_jobs, min_size=2, max_size=6), max_batch_size=st.sampled_from([2, 4, 8]))
def test_small_models(small: Runner, mix: list[dict[str, Any]], max_batch_size: int) -> None:
    jobs, leaving = [], set()
    for number, order in enumerate(mix):
        values = dict(order)
        if values.pop("cancelled"):
            leaving.add(f"job{number}")
        jobs.append(made_up_work(small.family.model, f"job{number}", values))
    check(small, jobs, leaving, max_batch_size)
