"""Where the engine says that a run's time went, against what was measured inside the runner."""

import time
from collections.abc import Callable, Sequence
from threading import Event

import pytest
from PIL import Image

from serve.diffusion.engine import Engine, Work
from serve.diffusion.profile import Profile
from serve.diffusion.run import Picture, Spent
from serve.diffusion.runner import Latents, Runner
from serve.diffusion.scheduler import Row, StepScheduler
from serve.domain.jobs import StepEvent
from serve.errors import OutOfMemory
from serve.telemetry.metrics import InProcessMetrics

MakeWork = Callable[..., Work]
NEAR_S = 0.02
"""What may pass beside a step that is timed from inside, on a machine that is busy."""


class TimedRunner(Runner):
    """Tells of each step who was in it and how long it took, and how long each decoding took. The steps wait for
    `gate`."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.family)
        self.steps: list[tuple[list[str], float]] = []
        self.decodings: list[float] = []
        self.gate = Event()
        self.failing = 0

    def step(self, rows: Sequence[Row], most: int | None = None) -> dict[Row, Exception]:
        assert self.gate.wait(60)
        if self.failing and len(rows) > 1:
            self.failing -= 1
            raise OutOfMemory("no memory for a step")
        started = time.monotonic()
        failed = super().step(rows, most)
        self.steps.append(([row.run_id for row in rows], time.monotonic() - started))
        return failed

    def decode(self, latents: Latents, side: int | None = None) -> Picture:
        started = time.monotonic()
        picture = super().decode(latents, side)
        self.decodings.append(time.monotonic() - started)
        return picture

    def of(self, run: str) -> tuple[list[float], list[int]]:
        """Seconds and images of the steps that the run had a part in."""
        own = [(took, len(runs)) for runs, took in self.steps if run in runs]
        return [took for took, _ in own], [images for _, images in own]


def ignore(event: StepEvent) -> None:
    pass


def open_engine(runner: Runner, max_batch_size: int) -> Engine:
    profile = Profile(max_batch_size)
    return Engine(runner, StepScheduler(profile), profile, InProcessMetrics())


@pytest.fixture
def timed(runner: Runner) -> TimedRunner:
    return TimedRunner(runner)


def chain(spent: Spent) -> list[float]:
    return [spent.source_s, spent.batch_s, spent.steps_s, spent.decode_wait_s, spent.decode_s]


def check(spent: Spent) -> None:
    assert min(chain(spent)) >= -1e-9, spent
    assert sum(chain(spent)) == pytest.approx(spent.ended_at - spent.began_at)


def test_who_waits_for_turns_is_told_so(timed: TimedRunner, work: MakeWork) -> None:
    """Three jobs, and two of them fill a step: in turns, each is left out."""
    engine = open_engine(timed, max_batch_size=2)
    futures = {name: engine.submit(work(name, width=64, height=64), ignore) for name in ("a", "b", "c")}
    timed.gate.set()
    for name, future in futures.items():
        spent = future.result(60).spent
        check(spent)
        took, images = timed.of(name)
        assert len(took) == 8
        assert spent.steps_s == pytest.approx(sum(took), abs=NEAR_S * len(took))
        assert spent.batch_images == pytest.approx(sum(images) / len(images))
        first = next(n for n, (runs, _) in enumerate(timed.steps) if name in runs)
        last = max(n for n, (runs, _) in enumerate(timed.steps) if name in runs)
        without = [took for runs, took in timed.steps[first:last] if name not in runs]
        assert without, "it was in every step"
        assert spent.batch_s >= sum(without)
        assert spent.source_s == 0
    engine.stop()


def test_who_is_alone_waits_for_nobody(timed: TimedRunner, work: MakeWork) -> None:
    engine = open_engine(timed, max_batch_size=4)
    timed.gate.set()
    spent = engine.submit(work("alone"), ignore).result(60).spent
    engine.stop()
    check(spent)
    assert spent.batch_images == 1
    assert spent.batch_s < spent.steps_s
    assert spent.decode_s == pytest.approx(timed.decodings[0], abs=3 * NEAR_S)
    assert spent.vae_s == spent.decode_s


def test_images_of_a_job_share_its_steps_and_its_last_step_decides(timed: TimedRunner, work: MakeWork) -> None:
    """Three images, two in a step: the last one out has waited for the others, and the VAE's tail is what follows."""
    engine = open_engine(timed, max_batch_size=2)
    timed.gate.set()
    rendered = engine.submit(work("three", num_images=3, width=64, height=64), ignore).result(60)
    engine.stop()
    spent = rendered.spent
    check(spent)
    assert len(rendered.images) == 3
    assert 1 <= spent.batch_images <= 2
    assert spent.steps_s + spent.batch_s >= sum(took for _, took in timed.steps)
    assert spent.steps_s < sum(took for _, took in timed.steps)
    assert spent.vae_s == pytest.approx(sum(timed.decodings), abs=3 * NEAR_S)
    assert spent.decode_s <= spent.vae_s


def test_waiting_for_the_vae_is_no_decoding(timed: TimedRunner, work: MakeWork) -> None:
    """Three images end with one step: the VAE takes them one by one."""
    engine = open_engine(timed, max_batch_size=4)
    futures = [engine.submit(work(f"job{n}", num_inference_steps=2), ignore) for n in range(4)]
    timed.gate.set()
    spents = sorted((future.result(60).spent for future in futures), key=lambda spent: spent.ended_at)
    engine.stop()
    for spent in spents:
        check(spent)
    # The first began its steps alone; the last of the others has waited for two of them, less the way to the VAE.
    assert spents[-1].decode_wait_s > sum(timed.decodings[1:3]) / 2


def test_encoding_what_it_starts_from_comes_before_its_turns(timed: TimedRunner, work: MakeWork) -> None:
    engine = open_engine(timed, max_batch_size=4)
    timed.gate.set()
    source = Image.new("RGB", (128, 128), "green")
    spent = engine.submit(work("image", image=source), ignore).result(60).spent
    engine.stop()
    check(spent)
    assert spent.source_s > 0
    assert spent.vae_s == pytest.approx(spent.decode_s + spent.source_s, abs=3 * NEAR_S)
    assert len(timed.of("image")[0]) == 6, "strength 0.8 of 8 steps"


def test_a_step_that_was_tried_again_leaves_no_gap(timed: TimedRunner, work: MakeWork) -> None:
    engine = open_engine(timed, max_batch_size=2)
    timed.failing = 1
    futures = [engine.submit(work(name, num_inference_steps=3), ignore) for name in ("a", "b")]
    timed.gate.set()
    for future in futures:
        check(future.result(60).spent)
    engine.stop()
    assert not timed.failing
