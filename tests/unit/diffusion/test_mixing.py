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
from serve.domain.conditioning import Mix, Phase, Schedule, TextEmbedding
from serve.domain.orders import ImageRequest, Task
from serve.models import ModelFolder, check_folder
from serve.models.samplers import sampler_names
from serve.settings.pools import DiffusionSettings
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
    "mask_blur": st.sampled_from([None, 0.0, 3.0]),
    "variation_seed": st.integers(0, 2**32 - 2),
    "variation_strength": st.sampled_from([0.0, 0.0, 0.3]),
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
    if source != "mask":
        values["mask_blur"] = None
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
        "how": st.sampled_from(["switch", "ramp", "and"]),
        "guidance_scale": st.sampled_from([0.0, 1.0, 2.5, 7.0]),
        "scheduler": st.sampled_from([None, *sampler_names("diffusion")]),
        "num_images": st.integers(1, 2),
        "width": st.sampled_from([64, 96]),
        "height": st.sampled_from([64, 128]),
    }
)


def scheduled(work: MakeWork, job: Work, then: str | None, how: str) -> Work:
    """The job with another prompt: from its second step on, with its own again for the last; mixed with its own, more
    of it at each step; or composed with its own, where there is guidance. Texts of unlike lengths are not mixed."""
    if then is None:
        return job
    request, text = job.request, job.request.text
    other = work("", then, negative_prompt=text.negative_prompt or "", guidance_scale=request.guidance_scale)
    texts = job.schedule.texts + other.schedule.texts
    ours, theirs = job.schedule.at(0), shifted(other.schedule.at(0), len(job.schedule.texts))
    ((_, mine),), ((_, added),) = ours.positive, theirs.positive
    if how == "and" and request.guided:
        composed = replace(ours, positive=((0.9, mine), (0.4, added)))
        return replace(job, request=replace(request, composed=2), schedule=Schedule(texts, (composed,)))
    steps = request.num_inference_steps
    if how == "ramp" and len({len(each.context) for each in texts}) == 1:
        shares = [step / steps for step in range(steps)]
        mixes = [scaled(mine, 1 - share) + scaled(added, share) for share in shares]
        ramp = (replace(ours, first=step, positive=((1.0, mix),)) for step, mix in enumerate(mixes))
        return replace(job, schedule=Schedule(texts, tuple(ramp)))
    phases = ours, replace(theirs, first=1), replace(ours, first=max(2, steps - 1))
    return replace(job, schedule=Schedule(texts, phases))


def shifted(phase: Phase, by: int) -> Phase:
    """The phase over texts that come after so many others."""

    def mix(mix: Mix) -> Mix:
        return tuple((share, index + by) for share, index in mix)

    negative = None if phase.negative is None else mix(phase.negative)
    return Phase(phase.first, tuple((weight, mix(each)) for weight, each in phase.positive), negative)


def scaled(mix: Mix, by: float) -> Mix:
    return tuple((share * by, index) for share, index in mix)


@slow(max_examples=10)
@given(mix=st.lists(sd_jobs, min_size=2, max_size=7), max_batch_size=st.sampled_from([2, 4, 8]))
def test_the_shipped_model(runner: Runner, work: MakeWork, mix: list[dict[str, Any]], max_batch_size: int) -> None:
    jobs, leaving = [], set()
    for number, order in enumerate(mix):
        values = dict(order)
        then, how, name = values.pop("then"), values.pop("how"), f"job{number}"
        if values.pop("cancelled"):
            leaving.add(name)
        jobs.append(scheduled(work, work(name, **inputs(values), **values), then, how))
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
        "composed": st.integers(1, 3),
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
    """A job whose text is made up: one prompt or several, each mixed with one and the same from the second step on."""
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
    composed = values["composed"] = values["composed"] if has_negative else 1
    texts = tuple(
        TextEmbedding(normal(each, width), normal(pooled) if pooled else None)
        for each in (tokens,) * (composed + 1) + (negative_tokens,) * has_negative
    )
    negative: Mix | None = ((1.0, composed + 1),) if has_negative else None
    parts = [(0.8 / (n + 1), ((1.0, n),)) for n in range(composed)]
    mixed = [(weight, ((0.3, n), (0.7, composed))) for n, (weight, _) in enumerate(parts)]
    schedule = Schedule(
        texts,
        (Phase(0, tuple(parts), negative), Phase(1, tuple(mixed), negative)),
        ids if model.family == "sdxl" else None,
    )
    started = inputs(values)
    kept = {key: None if each is None else f"{name}/{key}.png" for key, each in started.items()}
    request = ImageRequest(model=model.name, prompt="", **values, **kept)
    return Work(name, request, schedule, started.get("image"), started.get("mask"))


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
