"""The step loop on the shipped model: parity with diffusers, mixing, joining, leaving, failing alone."""

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from threading import Event

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import HealthCheck, given, settings
from PIL import Image

from serve.diffusion.engine import Engine, Rendered, Work
from serve.diffusion.families import SdFamily
from serve.diffusion.runner import Runner, open_runner
from serve.diffusion.scheduler import Row, StepScheduler
from serve.domain import Conditioning, StepEvent
from serve.errors import DeviceLost, GenerationFailed
from serve.models import ModelFolder
from serve.settings import DiffusionSettings
from serve.telemetry.metrics import InProcessMetrics

MakeWork = Callable[..., Work]


def ignore(event: StepEvent) -> None:
    pass


def difference(a: Image.Image, b: Image.Image) -> int:
    """Largest difference of a channel, in 1/255."""
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def alone(runner: Runner, work: Work) -> list[Image.Image]:
    """The job's images, drawn with nothing beside them, without the engine."""
    rows = runner.rows(work.run_id, work.request)
    images = []
    for row in rows:
        runner.begin(row, work.request, work.conditioning)
        for _ in range(row.steps):
            assert not runner.step([row])
        images.append(runner.finish(row))
    return images


@pytest.fixture(scope="module")
def stock(model: ModelFolder) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(model.path, local_files_only=True, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_stock(pipeline: StableDiffusionPipeline, job: Work) -> Image.Image:
    image: Image.Image = pipeline(
        job.request.prompt,
        negative_prompt=job.request.negative_prompt,
        num_inference_steps=job.request.num_inference_steps,
        guidance_scale=job.request.guidance_scale,
        generator=torch.Generator().manual_seed(job.request.seed),
    ).images[0]
    return image


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_equals_the_stock_pipeline(
    engine: Engine, work: MakeWork, stock: StableDiffusionPipeline, guidance_scale: float
) -> None:
    job = work("parity", "a green star on yellow", seed=11, guidance_scale=guidance_scale, negative_prompt="red")
    rendered = engine.submit(job, ignore).result(60)
    assert difference(rendered.images[0], by_stock(stock, job)) <= 1


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}),  # Stable Diffusion 1.5's own: one forward more than steps
        ("HeunDiscreteScheduler", {}),  # two forwards a step
        ("EulerAncestralDiscreteScheduler", {}),  # adds noise
        ("DDIMScheduler", {}),  # an old configuration, without clip_sample and steps_offset
        ("UniPCMultistepScheduler", {}),
    ],
)
def test_a_folder_with_another_sampler_equals_the_stock_pipeline(
    tmp_path: Path, work: MakeWork, model: ModelFolder, sampler: str, options: dict[str, object]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model.path, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", sampler]
    (folder / "model_index.json").write_text(json.dumps(index))
    old = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    kept = {name: old[name] for name in ("beta_start", "beta_end", "beta_schedule", "prediction_type")}
    config = {"_class_name": sampler, "num_train_timesteps": 1000} | kept | options
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    stock = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    runner = open_runner(replace(model, path=folder), DiffusionSettings(device="cpu", torch_threads=1))
    job = work("sampler", "a blue ring on white", seed=5)
    assert difference(alone(runner, job)[0], by_stock(stock, job)) <= 1


mixes = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.sampled_from(["a red circle on a blue background", "a green star", "a pink heart on black"]),
            "negative_prompt": st.sampled_from(["", "yellow"]),
            "num_inference_steps": st.integers(2, 9),
            "guidance_scale": st.sampled_from([0.0, 1.0, 2.5, 7.0]),
            "seed": st.integers(0, 2**32 - 2),
            "num_images": st.integers(1, 2),
            "width": st.sampled_from([128, 160]),
        }
    ),
    min_size=2,
    max_size=6,
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mix=mixes)
def test_a_mix_equals_its_solo_runs(engine: Engine, runner: Runner, work: MakeWork, mix: list[dict]) -> None:
    jobs = [work(f"job{number}", **parameters) for number, parameters in enumerate(mix)]
    futures = [engine.submit(job, ignore) for job in jobs]
    mixed = [future.result(120) for future in futures]
    for job, rendered in zip(jobs, mixed, strict=True):
        for together, solo in zip(rendered.images, alone(runner, job), strict=True):
            assert difference(together, solo) <= 1


def test_a_late_short_job_overtakes_a_long_one(engine: Engine, work: MakeWork) -> None:
    under_way = Event()
    ended: list[str] = []
    long = engine.submit(work("long", num_inference_steps=60), lambda event: under_way.set())
    assert under_way.wait(60)
    short = engine.submit(work("short", num_inference_steps=3), ignore)
    for name, future in (("long", long), ("short", short)):
        future.add_done_callback(lambda _, name=name: ended.append(name))
    wait([long, short], 120)
    assert ended == ["short", "long"]


def test_steps_are_told_in_order(engine: Engine, work: MakeWork) -> None:
    told: list[StepEvent] = []
    engine.submit(work("told", num_inference_steps=5, num_images=2), told.append).result(60)
    assert told == [StepEvent("told", step, 5) for step in range(1, 6)]


def test_images_of_a_job_take_successive_seeds(engine: Engine, work: MakeWork) -> None:
    both = engine.submit(work("both", seed=7, num_images=2), ignore).result(60)
    second = engine.submit(work("second", seed=8), ignore).result(60)
    assert difference(both.images[1], second.images[0]) <= 1
    assert difference(both.images[0], second.images[0]) > 10


def test_a_cancelled_job_leaves_and_the_others_go_on(engine: Engine, work: MakeWork) -> None:
    under_way = Event()
    gone = engine.submit(work("gone", num_inference_steps=150), lambda event: under_way.set())
    stays = engine.submit(work("stays", num_inference_steps=20), ignore)
    assert under_way.wait(60)
    engine.cancel("gone")
    with pytest.raises(GenerationFailed, match="cancelled"):
        gone.result(60)
    assert len(stays.result(60).images) == 1


def test_not_a_number_fails_its_job_alone(engine: Engine, work: MakeWork) -> None:
    good = work("good")
    text = good.conditioning
    poison = Work("bad", good.request, Conditioning(torch.full_like(text.positive, torch.nan), text.negative))
    bad, fine = engine.submit(poison, ignore), engine.submit(good, ignore)
    with pytest.raises(GenerationFailed, match="not-a-number"):
        bad.result(60)
    assert len(fine.result(60).images) == 1
    assert engine.alive


def test_a_job_that_breaks_the_step_fails_and_the_loop_goes_on(engine: Engine, work: MakeWork) -> None:
    good = work("after")
    wrong = Conditioning(torch.zeros(77, 3), torch.zeros(77, 3))
    with pytest.raises(GenerationFailed):
        engine.submit(Work("wrong", good.request, wrong), ignore).result(60)
    assert len(engine.submit(good, ignore).result(60).images) == 1


def test_a_job_that_breaks_the_step_leaves_its_neighbours_unharmed(
    engine: Engine, runner: Runner, work: MakeWork
) -> None:
    good = [work(f"good{n}", seed=n, num_inference_steps=12) for n in range(3)]
    wrong = Work("wrong", good[0].request, Conditioning(torch.zeros(77, 3), torch.zeros(77, 3)))
    futures = [engine.submit(job, ignore) for job in (good[0], wrong, *good[1:])]
    with pytest.raises(GenerationFailed):
        futures.pop(1).result(60)
    for job, future in zip(good, futures, strict=True):
        assert difference(future.result(60).images[0], alone(runner, job)[0]) <= 1


class LostDevice(Runner):
    """A runner whose device fails at a step, as a real one does: for good."""

    def step(self, rows: Sequence[Row]) -> dict[Row, Exception]:
        raise DeviceLost("the device failed")


def test_a_lost_device_ends_the_loop_and_every_future(model: ModelFolder, work: MakeWork) -> None:
    broken = LostDevice(SdFamily(model, torch.device("cpu"), torch.float32))
    engine = Engine(broken, StepScheduler(4), InProcessMetrics())
    futures = [engine.submit(work(f"lost{n}"), ignore) for n in range(3)]
    for future in futures:
        assert isinstance(future.exception(60), DeviceLost)
    assert not engine.alive
    assert isinstance(engine.submit(work("late"), ignore).exception(60), DeviceLost)
    engine.stop()


def test_stop_finishes_what_was_submitted(runner: Runner, work: MakeWork) -> None:
    metrics = InProcessMetrics()
    engine = Engine(runner, StepScheduler(8), metrics)
    futures: list[Future[Rendered]] = [engine.submit(work(f"last{n}", seed=n), ignore) for n in range(4)]
    engine.stop()
    assert all(future.done() and len(future.result().images) == 1 for future in futures)
    assert not engine.alive
    assert metrics.value("tandem_engine_steps_total") < 4 * 8, "the jobs did not step together"
