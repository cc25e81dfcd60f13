"""The step loop on the shipped model: parity with diffusers, mixing, joining, leaving, failing alone."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Event

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import HealthCheck, given, settings
from PIL import Image

from serve.diffusion.engine import Engine, Rendered, Work
from serve.diffusion.runner import Runner
from serve.diffusion.scheduler import StepPlan, StepScheduler
from serve.domain import Conditioning, StepEvent
from serve.errors import GenerationFailed
from serve.models import ModelFolder
from serve.telemetry.metrics import InProcessMetrics

MakeWork = Callable[..., Work]


def ignore(event: StepEvent) -> None:
    pass


def difference(a: Image.Image, b: Image.Image) -> int:
    """Largest difference of a channel, in 1/255."""
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def alone(runner: Runner, work: Work) -> list[Image.Image]:
    """The job's images, drawn with nothing beside them, without the engine."""
    rows = runner.rows(work.job_id, work.request)
    images = []
    for row in rows:
        runner.begin(row, work.request, work.conditioning)
        for _ in range(row.steps):
            runner.step(StepPlan((row,)))
        images.append(runner.finish(row))
    return images


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_equals_the_stock_pipeline(engine: Engine, work: MakeWork, model: ModelFolder, guidance_scale: float) -> None:
    stock = StableDiffusionPipeline.from_pretrained(model.path, local_files_only=True, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    job = work(
        "parity", "a green star on a yellow background", seed=11, guidance_scale=guidance_scale, negative_prompt="red"
    )
    expected = stock(
        job.request.prompt,
        negative_prompt=job.request.negative_prompt,
        num_inference_steps=job.request.num_inference_steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(11),
    ).images[0]
    rendered = engine.submit(job, ignore).result(60)
    assert difference(rendered.images[0], expected) <= 1


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


def test_stop_finishes_what_was_submitted(runner: Runner, work: MakeWork) -> None:
    metrics = InProcessMetrics()
    engine = Engine(runner, StepScheduler(8), metrics)
    futures: list[Future[Rendered]] = [engine.submit(work(f"last{n}", seed=n), ignore) for n in range(4)]
    engine.stop()
    assert all(future.done() and len(future.result().images) == 1 for future in futures)
    assert not engine.alive
    assert metrics.value("tandem_engine_steps_total") < 4 * 8, "the jobs did not step together"
