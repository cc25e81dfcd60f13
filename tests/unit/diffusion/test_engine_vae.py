"""The VAE beside the step loop: it stalls no step, no cancel waits for it, and what fails there is one run's."""

from collections.abc import Callable
from io import BytesIO
from threading import Event, current_thread

import numpy as np
import pytest
import torch
from PIL import Image
from support.parity import difference, drawn

from serve.diffusion.engine import Engine, Work
from serve.diffusion.families.base import Family
from serve.diffusion.profile import Profile
from serve.diffusion.run import Picture
from serve.diffusion.runner import Latents, Runner
from serve.diffusion.scheduler import StepScheduler
from serve.diffusion.state import Source
from serve.diffusion.vae_thread import VaeThread
from serve.domain.jobs import Preview, StepEvent
from serve.errors import DeviceLost, GenerationFailed, OutOfMemory
from serve.telemetry.metrics import InProcessMetrics

MakeWork = Callable[..., Work]


def ignore(event: StepEvent) -> None:
    pass


def open_engine(runner: Runner) -> Engine:
    profile = Profile(4)
    return Engine(runner, StepScheduler(profile), profile, InProcessMetrics())


class SlowVae(Runner):
    """What the VAE does waits for `gate`, and fails with `errors` as long as there are any."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.family)
        self.gate = Event()
        self.reached = Event()
        self.errors: list[Exception] = []
        self.decoded = 0
        self.sides: list[int | None] = []

    def _wait(self) -> None:
        self.reached.set()
        assert self.gate.wait(60)
        if self.errors:
            raise self.errors.pop()

    def encode(self, work: Work, side: int | None = None) -> Source | None:
        self._wait()
        return super().encode(work, side)

    def decode(self, latents: Latents, side: int | None = None) -> Picture:
        self.sides.append(side)
        self._wait()
        self.decoded += 1
        return super().decode(latents, side)


@pytest.fixture
def slow(runner: Runner) -> SlowVae:
    return SlowVae(runner)


def test_steps_go_on_while_an_image_is_decoded(slow: SlowVae, work: MakeWork) -> None:
    engine = open_engine(slow)
    last = Event()
    first = engine.submit(work("first", num_inference_steps=2), ignore)
    assert slow.reached.wait(60)
    second = engine.submit(work("second"), lambda event: event.step == event.steps and last.set())
    assert last.wait(60), "the decoding held the steps up"
    assert not first.done()
    slow.gate.set()
    assert len(first.result(60).images) == len(second.result(60).images) == 1
    engine.stop()


def test_a_decoding_that_hangs_shows(slow: SlowVae, work: MakeWork) -> None:
    engine = open_engine(slow)
    future = engine.submit(work("hangs", num_inference_steps=1), ignore)
    assert slow.reached.wait(60)
    assert engine.still_s > 0
    slow.gate.set()
    future.result(60)
    engine.stop()
    assert engine.still_s == 0


@pytest.mark.parametrize("source", [None, Image.new("RGB", (128, 128), "green")])
def test_cancel_waits_for_no_vae(slow: SlowVae, work: MakeWork, source: Image.Image | None) -> None:
    """While encoding, and while decoding; what comes of it is thrown away, also by a run of the same name."""
    engine = open_engine(slow)
    gone = engine.submit(work("name", num_inference_steps=1, num_images=2, image=source), ignore)
    assert slow.reached.wait(60)
    engine.cancel("name")
    with pytest.raises(GenerationFailed, match="cancelled"):
        gone.result(60)
    again = engine.submit(work("name", seed=5), ignore)
    slow.gate.set()
    assert len(again.result(60).images) == 1
    engine.stop()
    # The second image of the run that is gone was not decoded; the first one's decoding was under way, if any.
    assert slow.decoded == (2 if source is None else 1)


def test_an_image_to_start_from_joins_once_it_is_encoded(slow: SlowVae, work: MakeWork) -> None:
    engine = open_engine(slow)
    told: list[str] = []
    last = Event()
    source = Image.new("RGB", (128, 128), "green")
    from_image = engine.submit(work("image", image=source), lambda event: told.append("image"))
    assert slow.reached.wait(60)
    engine.submit(work("text"), lambda event: (told.append("text"), event.step == event.steps and last.set()))
    assert last.wait(60)
    assert "image" not in told
    slow.gate.set()
    rendered = from_image.result(60)
    assert told.count("image") == 6, "strength 0.8 of 8 steps"
    assert difference(rendered.images[0], drawn(slow, work("alone", image=source))[0]) <= 1
    assert 0 < rendered.spent.decode_s < rendered.spent.vae_s
    engine.stop()


def test_a_decoding_that_fails_is_its_jobs_alone(slow: SlowVae, work: MakeWork) -> None:
    slow.errors = [GenerationFailed("the image came out as not-a-number")]
    slow.gate.set()
    engine = open_engine(slow)
    bad = engine.submit(work("bad", num_inference_steps=2), ignore)
    with pytest.raises(GenerationFailed, match="not-a-number"):
        bad.result(60)
    assert len(engine.submit(work("good"), ignore).result(60).images) == 1
    engine.stop()


def test_a_decoding_without_memory_beside_a_step_is_made_between_two(slow: SlowVae, work: MakeWork) -> None:
    slow.errors = [OutOfMemory("the VAE: the device ran out of memory")]
    slow.gate.set()
    engine = open_engine(slow)
    again = engine.submit(work("again"), ignore).result(60)
    assert difference(again.images[0], drawn(slow, work("alone"))[0]) <= 1
    assert again.approximate == (), "of one tile: there is none to join it to"
    slow.errors = [OutOfMemory("the VAE: the device ran out of memory")] * 2
    with pytest.raises(OutOfMemory):
        engine.submit(work("never"), ignore).result(60)
    assert engine.alive
    engine.stop()


def test_a_decoding_without_memory_is_made_in_tiles_and_says_so(slow: SlowVae, work: MakeWork) -> None:
    slow.gate.set()
    engine = open_engine(slow)
    wide = {"num_inference_steps": 1, "width": 640, "height": 64}
    assert engine.submit(work("whole", **wide), ignore).result(60).approximate == ()
    slow.errors = [OutOfMemory("the VAE: the device ran out of memory")] * 2
    tiled = engine.submit(work("tiled", **wide), ignore).result(60)
    assert tiled.approximate == ("tiled_vae",)
    assert isinstance(tiled.images[0], Image.Image)
    assert tiled.images[0].size == (640, 64)
    assert slow.sides == [None, None, None, 512]
    engine.stop()


@pytest.mark.parametrize("source", [None, Image.new("RGB", (128, 128), "green")])
def test_a_device_that_is_lost_beside_the_loop_ends_it(
    slow: SlowVae, work: MakeWork, source: Image.Image | None
) -> None:
    slow.errors = [DeviceLost("the VAE: the device failed")]
    engine = open_engine(slow)
    lost = engine.submit(work("lost", num_inference_steps=1, image=source), ignore)
    other = engine.submit(work("other", num_inference_steps=150), ignore)
    slow.gate.set()
    assert isinstance(lost.exception(60), DeviceLost)
    assert isinstance(other.exception(60), DeviceLost)
    engine.stop()
    assert not engine.alive


def test_previews_are_told_every_so_many_steps(runner: Runner, work: MakeWork) -> None:
    engine = open_engine(runner)
    seen: list[Preview] = []
    made = Event()

    def on_preview(preview: Preview) -> None:
        seen.append(preview)
        made.set()

    def on_step(event: StepEvent) -> None:
        """A step after one that was previewed waits for the preview, so that none is dropped here."""
        if event.step % 3 == 1 and event.step > 1:
            assert made.wait(60)
            made.clear()

    future = engine.submit(work("seen", num_inference_steps=9, preview_every=3, width=96), on_step, on_preview)
    future.result(60)
    engine.stop()
    assert [(preview.step, preview.steps, preview.index) for preview in seen] == [(3, 9, 0), (6, 9, 0)]
    for preview in seen:
        picture = Image.open(BytesIO(preview.data))
        assert picture.format == "JPEG"
        assert abs(picture.width / picture.height - 96 / 128) < 0.01


def test_previews_that_can_not_keep_up_are_left_out(runner: Runner, work: MakeWork) -> None:
    engine = open_engine(runner)
    seen: list[tuple[int, int]] = []
    ended = Event()

    def slow_preview(preview: Preview) -> None:
        seen.append((preview.step, preview.index))
        assert ended.wait(60)

    future = engine.submit(
        work("slow", num_inference_steps=8, preview_every=1, num_images=2),
        lambda event: event.step == event.steps and ended.set(),
        slow_preview,
    )
    assert len(future.result(60).images) == 2
    engine.stop()
    assert seen[0] == (1, 0)
    assert len(seen) <= 2, "previews queued up"


def test_a_preview_that_fails_costs_no_image(runner: Runner, work: MakeWork) -> None:
    engine = open_engine(runner)

    def broken(preview: Preview) -> None:
        raise RuntimeError("the event loop is closed")

    future = engine.submit(work("unseen", num_inference_steps=5, preview_every=1), ignore, broken)
    assert len(future.result(60).images) == 1
    engine.stop()


def test_what_kept_an_image_from_being_exact_is_told(runner: Runner, work: MakeWork) -> None:
    engine = open_engine(runner)
    cached = engine.submit(work("cached", num_inference_steps=20, step_cache=1.0), ignore)
    assert cached.result(60).approximate == ("step_cache",)
    engine.stop()


def test_previews_wait_for_everything_else() -> None:
    thread = VaeThread(lambda error: None)
    gate, done = Event(), []
    thread.submit(lambda: done.append(gate.wait(60)))
    thread.submit(lambda: done.append("preview"), preview=True)
    thread.submit(lambda: done.append("first"))
    thread.submit(lambda: done.append("second"))
    ended = Event()
    thread.submit(ended.set, preview=True)
    gate.set()
    assert ended.wait(60)
    thread.close()
    thread.join()
    assert done == [True, "first", "second", "preview"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_vae_thread_that_ends_takes_the_loop_with_it(slow: SlowVae, work: MakeWork) -> None:
    """Of whatever: without it no image is ever finished, and nobody is left to wait for one."""
    slow.gate.set()
    engine = open_engine(slow)
    steps: list[int] = []

    def gone(latents: Latents, side: int | None = None) -> Picture:
        raise SystemExit("out of the thread")

    slow.decode = gone  # type: ignore[method-assign]
    lost = engine.submit(work("lost", num_inference_steps=1), ignore)
    other = engine.submit(work("other", num_inference_steps=150), lambda event: steps.append(event.step))
    assert isinstance(lost.exception(60), DeviceLost)
    assert isinstance(other.exception(60), DeviceLost)
    engine.stop()
    assert not engine.alive


def test_pictures_of_16_bits_come_through(runner: Runner, work: MakeWork) -> None:
    engine = open_engine(runner)
    deep = engine.submit(work("deep", bit_depth=16), ignore).result(60).images[0]
    plain = engine.submit(work("plain"), ignore).result(60).images[0]
    engine.stop()
    assert isinstance(deep, np.ndarray)
    assert deep.dtype == np.uint16
    assert np.abs(deep / 257 - np.asarray(plain, dtype=float)).max() <= 1


def test_on_apples_gpus_the_vae_works_between_two_steps(slow: SlowVae, work: MakeWork) -> None:
    """Two threads can't share one: everything happens on the loop's."""
    threads: set[str] = set()
    slow.gate.set()
    step, decode, encode, preview = slow.step, slow.decode, slow.encode, slow.preview

    def here(name: str, call: Callable[..., object]) -> None:
        setattr(slow, name, lambda *args: (threads.add(current_thread().name), call(*args))[1])

    for name, call in {"step": step, "decode": decode, "encode": encode, "preview": preview}.items():
        here(name, call)
    family = slow.family
    slow.family = MpsFamily(family)  # type: ignore[assignment]
    engine = open_engine(slow)
    seen: list[Preview] = []
    slow.family = family
    job = work("mps", image=Image.new("RGB", (128, 128), "green"), preview_every=2)
    rendered = engine.submit(job, ignore, seen.append).result(60)
    engine.stop()
    assert threads == {"engine"}
    assert difference(rendered.images[0], drawn(slow, job)[0]) <= 1
    assert seen
    assert not engine.alive


class MpsFamily:
    """What a family on Apple's GPU says of its device."""

    def __init__(self, family: Family) -> None:
        self.device = torch.device("mps")
        self.vae = family.vae
