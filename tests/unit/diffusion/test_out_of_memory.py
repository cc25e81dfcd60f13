"""Memory that runs out, at every phase: what is tried next, who is told, who goes on."""

from __future__ import annotations

import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Event, current_thread

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.parity import difference, drawn

from serve.devices import device_errors
from serve.diffusion.curves import Curve
from serve.diffusion.engine import Engine, Rendered, Work
from serve.diffusion.ladder import DESCENT_S, Ladder, first_that_loads
from serve.diffusion.profile import Profile
from serve.diffusion.run import Picture
from serve.diffusion.rungs import check_library, descend
from serve.diffusion.runner import Latents, Runner, open_runner
from serve.diffusion.scheduler import Row, StepScheduler
from serve.diffusion.state import Source
from serve.diffusion.vae_thread import VaeThread
from serve.diffusion.vae_ways import Way, Ways
from serve.domain.jobs import Relief, StepEvent
from serve.domain.orders import ImageRequest
from serve.errors import GenerationFailed, OperatorError, OutOfMemory
from serve.models import ModelFolder
from serve.quantize import load_library
from serve.rungs import LADDER, Rung
from serve.settings.pools import DiffusionSettings
from serve.telemetry.metrics import InProcessMetrics

MakeWork = Callable[..., Work]
Short = Callable[[str, int, int | None], bool]
pytestmark = pytest.mark.usefixtures("quick_gc")


def ignore(event: StepEvent) -> None:
    pass


class Starved(Runner):
    """A device that has no memory where `short` says so, of a phase, the lanes of a step or pixels of an image, and the
    side of the VAE's tiles. `tried` is what was asked of it, in order; `threads` are those that computed."""

    def __init__(self, runner: Runner, short: Short) -> None:
        super().__init__(runner.family)
        self.short = short
        self.tried: list[tuple[str, int, int | None]] = []
        self.stepped: list[list[str]] = []
        self.threads: dict[str, set[str]] = {}

    def ask(self, phase: str, size: int, side: int | None = None) -> None:
        self.tried.append((phase, size, side))
        self.threads.setdefault(phase, set()).add(current_thread().name)
        with device_errors("the device"):
            if self.short(phase, size, side):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def begin(self, row: Row, work: Work, source: Source | None) -> None:
        self.ask("begin", row.lanes)
        super().begin(row, work, source)

    def step(self, rows: Sequence[Row], most: int | None = None) -> dict[Row, Exception]:
        lanes = sum(row.lanes for row in rows)
        self.ask("step", lanes if most is None else min(most, lanes))
        self.stepped.append([row.run_id for row in rows])
        return super().step(rows, most)

    def encode(self, work: Work, side: int | None = None) -> Source | None:
        self.ask("encode", work.request.pixels, side)
        return super().encode(work, side)

    def decode(self, latents: Latents, side: int | None = None) -> Picture:
        self.ask("decode", latents.tensor[0, 0].numel() * self.family.vae.scale_factor**2, side)
        return super().decode(latents, side)


class Steps:
    """A ladder's way down, of which some rungs can't be taken."""

    def __init__(self, refused: Sequence[Rung] = ()) -> None:
        self.taken: list[Rung] = []
        self.asked: list[Rung] = []
        self.refused = refused

    def __call__(self, rung: Rung) -> None:
        self.asked.append(rung)
        if rung in self.refused:
            raise GenerationFailed("the denoiser can't go down")
        self.taken.append(rung)


class Told:
    """What a run was told, by run."""

    def __init__(self) -> None:
        self.relief: dict[str, list[Relief]] = {}

    def by(self, run_id: str) -> Callable[[Relief], None]:
        return self.relief.setdefault(run_id, []).append

    def measures(self, run_id: str) -> list[str]:
        return [each.measure for each in self.relief[run_id]]


class Clock:
    """`time.monotonic`, put `ahead_s`."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self._real = time.monotonic

    def monotonic(self) -> float:
        return self._real() + self.ahead_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    return clock


@contextmanager
def an_engine(
    runner: Runner, way: Callable[[Rung], None] = lambda rung: None, worst: Rung = Rung.RESIDENT, batch: int = 4
) -> Iterator[tuple[Engine, InProcessMetrics]]:
    profile, metrics = Profile(batch), InProcessMetrics()
    engine = Engine(runner, StepScheduler(profile), profile, metrics, ladder=Ladder(Rung.RESIDENT, worst, way))
    try:
        yield engine, metrics
        assert engine.alive
    finally:
        engine.stop()


def never(phase: str, size: int, side: int | None) -> bool:
    return False


def submit(engine: Engine, told: Told, work: Work) -> Future[Rendered]:
    return engine.submit(work, ignore, None, told.by(work.run_id))


def test_half_of_a_batch_steps_and_the_youngest_wait(runner: Runner, work: MakeWork) -> None:
    gate, told = Event(), Told()
    starved = Starved(runner, lambda phase, size, side: phase == "step" and gate.wait(60) and size > 3)
    jobs = [work(name, seed=n, num_inference_steps=3, guidance_scale=1.0) for n, name in enumerate("abcd")]
    with an_engine(starved) as (engine, metrics):
        futures = [submit(engine, told, job) for job in jobs]
        gate.set()
        images = [future.result(60).images[0] for future in futures]
    steps = [size for phase, size, _ in starved.tried if phase == "step"]
    whole = steps.index(4)
    first, second = starved.stepped[whole : whole + 2]
    assert len(first) == 2
    assert set(first) | set(second) == set("abcd"), "who has waited steps next"
    assert steps.count(4) == 1, "it is not asked for again"
    assert {tuple(told.measures(name)) for name in "abcd"} == {("fewer_images",)}
    assert metrics.value("tandem_engine_out_of_memory_total", phase="step", rung="resident") == 1
    for job, image in zip(jobs, images, strict=True):
        assert difference(image, drawn(runner, job)[0]) <= 1


def test_one_lane_without_memory_takes_the_next_rung_and_the_others_go_on(runner: Runner, work: MakeWork) -> None:
    way, told = Steps(refused=[Rung.VAE_SLICING]), Told()
    starved = Starved(runner, lambda phase, size, side: phase == "step" and len(way.taken) < 2)
    job, other = work("a", num_inference_steps=3), work("b", seed=2, num_inference_steps=3)
    with an_engine(starved, way, Rung.OFFLOAD) as (engine, metrics):
        first, second = submit(engine, told, job), submit(engine, told, other)
        results = first.result(60), second.result(60)
        assert engine.rung is Rung.ATTENTION_SLICING
        again = engine.submit(work("late"), ignore).result(60)
    assert way.asked == [Rung.VAE_SLICING, Rung.VAE_TILING, Rung.ATTENTION_SLICING]
    assert {result.rung for result in (*results, again)} == {Rung.ATTENTION_SLICING}
    assert metrics.value("tandem_engine_rung") == LADDER.index(Rung.ATTENTION_SLICING)
    assert metrics.value("tandem_engine_out_of_memory_total", phase="step", rung="vae_tiling") > 0
    assert [each for each in told.measures("a") + told.measures("b") if each in way.taken] == way.taken
    assert difference(results[0].images[0], drawn(runner, job)[0]) <= 1
    assert difference(results[1].images[0], drawn(runner, other)[0]) <= 1


def test_below_the_last_rung_a_job_fails_and_nobody_else(runner: Runner, work: MakeWork) -> None:
    way = Steps()
    wide = 96 * 8
    starved = Starved(runner, lambda phase, size, side: phase == "decode" and size == wide)
    with an_engine(starved, way, Rung.VAE_TILING) as (engine, _):
        bad = engine.submit(work("bad", width=96, height=8, num_inference_steps=1), ignore)
        good = engine.submit(work("good", width=64, height=64), ignore)
        assert isinstance(bad.exception(60), OutOfMemory)
        assert len(good.result(60).images) == 1
        assert engine.rung is Rung.VAE_TILING
        again = engine.submit(work("again", width=96, height=8, num_inference_steps=1), ignore)
        assert isinstance(again.exception(60), OutOfMemory)
    assert way.taken == [Rung.VAE_SLICING, Rung.VAE_TILING], "a ladder only goes down"


def test_a_rung_that_can_not_be_taken_is_asked_for_once(runner: Runner, work: MakeWork) -> None:
    way = Steps(refused=LADDER)
    starved = Starved(runner, lambda phase, size, side: phase == "step")
    with an_engine(starved, way, Rung.INT4) as (engine, _):
        for name in ("a", "b"):
            assert isinstance(engine.submit(work(name), ignore).exception(60), OutOfMemory)
        assert engine.rung is Rung.RESIDENT
    assert way.asked == list(LADDER[1:6])


def test_an_image_that_can_not_begin_takes_the_next_rung(runner: Runner, work: MakeWork) -> None:
    way, told = Steps(), Told()
    starved = Starved(runner, lambda phase, size, side: phase == "begin" and not way.taken)
    job = work("a", num_images=2)
    with an_engine(starved, way, Rung.CPU) as (engine, metrics):
        result = submit(engine, told, job).result(60)
    assert told.relief["a"] == [Relief("begin", "vae_slicing")]
    assert metrics.value("tandem_engine_out_of_memory_total", phase="begin", rung="resident") == 1
    for image, alone in zip(result.images, drawn(runner, job), strict=True):
        assert difference(image, alone) <= 1


@pytest.mark.parametrize("phase", ["encode", "decode"])
def test_the_vae_is_tried_between_steps_then_in_smaller_tiles_then_on_the_next_rung(
    runner: Runner, work: MakeWork, phase: str
) -> None:
    """And what was learned of a size is not forgotten: the next of it begins where the first one came through."""
    way, told = Steps(), Told()
    starved = Starved(runner, lambda at, size, side: at == phase and (side != 256 or not way.taken))
    image = Image.new("RGB", (640, 64), "green") if phase == "encode" else None
    size = {"width": 640, "height": 64, "num_inference_steps": 2, "image": image}
    with an_engine(starved, way, Rung.INT4) as (engine, metrics):
        result = submit(engine, told, work("a", **size)).result(60)
        assert told.relief["a"] == [
            Relief(phase, each) for each in ("between_steps", "tiles_512", "tiles_256", "vae_slicing")
        ]
        assert result.approximate == ("tiled_vae",)
        assert metrics.value("tandem_engine_out_of_memory_total", phase=phase, rung="resident") == 4
    asked = [side for at, _, side in starved.tried if at == phase]
    assert asked == [None, None, 512, 256, 256]
    assert starved.threads[phase] == {"vae", "engine"}


def test_a_size_that_ran_out_begins_where_it_came_through(runner: Runner, work: MakeWork) -> None:
    starved = Starved(runner, lambda phase, size, side: phase == "decode" and size > 128 * 128 and side is None)
    with an_engine(starved) as (engine, _):
        for name in ("first", "second"):
            result = engine.submit(work(name, width=640, height=64, num_inference_steps=1), ignore).result(60)
            assert result.approximate == ("tiled_vae",)
        small = engine.submit(work("small", num_inference_steps=1), ignore).result(60)
        assert small.approximate == ()
    assert [side for phase, _, side in starved.tried if phase == "decode"] == [None, None, 512, 512, None]


def test_ways_of_a_size() -> None:
    def request(width: int, height: int) -> ImageRequest:
        return ImageRequest(
            model="m", prompt="", width=width, height=height, num_inference_steps=1, guidance_scale=1.0, seed=1
        )

    ways = Ways("decode")
    beside, between = Way(True), Way(False)
    assert ways.of(request(512, 512), 1024, beside=True) == (beside, between, Way(False, 256))
    assert ways.of(request(256, 256), 1024, beside=True) == (beside, between)
    assert ways.of(request(2048, 512), 512, beside=False) == (between, Way(False, 256))
    ways.ran_out(beside, request(512, 512))
    ways.ran_out(between, request(1024, 1024))
    assert ways.of(request(512, 512), 1024, beside=True) == (between, Way(False, 256))
    assert ways.of(request(1024, 1024), 1024, beside=True) == (Way(False, 512), Way(False, 256))
    assert ways.of(request(504, 504), 1024, beside=True)[0] == beside
    ways.ran_out(Way(False, 256), request(256, 512))
    assert ways.of(request(256, 256), 1024, beside=True) == (beside, between), "not a way of this size"
    ways.relax()
    assert ways.of(request(1024, 1024), 1024, beside=True)[0] == beside


def test_on_a_lower_rung_the_vae_works_between_steps(runner: Runner, work: MakeWork) -> None:
    starved, seen = Starved(runner, never), []
    profile = Profile(4)
    ladder = Ladder(Rung.VAE_SLICING)
    engine = Engine(starved, StepScheduler(profile), profile, InProcessMetrics(), ladder=ladder)
    source = Image.new("RGB", (128, 128), "green")
    engine.submit(work("a", image=source, preview_every=2), ignore, seen.append).result(60)
    engine.stop()
    assert starved.threads["decode"] == starved.threads["encode"] == {"engine"}
    assert seen


def test_a_descent_waits_for_what_the_vae_is_at(runner: Runner, work: MakeWork) -> None:
    """It moves weights, and what is decoded has memory that the step is short of."""
    decoding, gate, told, seen = Event(), Event(), Told(), []

    def way(rung: Rung) -> None:
        seen.append(first.done() or decoded.is_set())

    decoded = Event()

    def short(phase: str, size: int, side: int | None) -> bool:
        if phase == "decode" and not decoding.is_set():
            decoding.set()
            assert gate.wait(60)
            decoded.set()
        if phase == "step" and decoding.is_set() and not seen:
            gate.set()
            return True
        return False

    with an_engine(Starved(runner, short), way, Rung.VAE_SLICING) as (engine, _):
        first = submit(engine, told, work("first", num_inference_steps=1))
        assert decoding.wait(60)
        second = submit(engine, told, work("second", guidance_scale=1.0))
        assert len(second.result(60).images) == len(first.result(60).images) == 1
    assert seen == [True]
    assert told.measures("second") == ["vae_slicing"]


def test_images_of_packed_weights_are_labelled(
    model: ModelFolder, work: MakeWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that a packing which failed has left behind too, on a rung that has none."""
    own, left = open_runner(model, DiffusionSettings(device="cpu", torch_threads=1)), [True] * 2
    functional = load_library().functional
    real = functional.quantize_blockwise

    def scarce(*args: object, **options: object) -> object:
        if not left:
            raise torch.OutOfMemoryError("none left")
        left.pop()
        return real(*args, **options)

    monkeypatch.setattr(functional, "quantize_blockwise", scarce)
    starved = Starved(own, lambda phase, size, side: phase == "step" and not own.family.packed)
    small = {"width": 32, "height": 32, "num_inference_steps": 1}
    with an_engine(starved, lambda rung: descend(own.family, rung), Rung.INT8) as (engine, _):
        assert isinstance(engine.submit(work("first", **small), ignore).exception(60), OutOfMemory)
        result = engine.submit(work("second", **small), ignore).result(60)
    assert (result.rung, result.approximate) == (Rung.ATTENTION_SLICING, ("int8",))


def test_a_way_down_is_no_hang_and_no_step_of_whom_it_was_for(runner: Runner, work: MakeWork, clock: Clock) -> None:
    """It takes minutes, in which nothing else can go on. Charged to the size that met it, that size would wait for its
    next turn as long."""
    gate, still = Event(), list[float]()

    def way(rung: Rung) -> None:
        for _ in range(2):
            clock.ahead_s += 0.75 * DESCENT_S
            still.append(engine.still_s)

    def short(phase: str, size: int, side: int | None) -> bool:
        assert gate.wait(60)
        return phase == "step" and not still

    starved = Starved(runner, short)
    small = {"guidance_scale": 1.0, "width": 32}
    with an_engine(starved, way, Rung.VAE_SLICING) as (engine, _):
        met = engine.submit(work("met", num_inference_steps=3, height=32, **small), ignore)
        other = engine.submit(work("other", num_inference_steps=12, height=64, **small), ignore)
        gate.set()
        spent = met.result(60).spent
        assert engine.moving_until > time.monotonic() - 60
        other.result(60)
    assert still[0] < 60, "it is under way"
    assert still[1] > 0.4 * DESCENT_S, "it hangs"
    assert spent.steps_s < 60
    assert spent.batch_s > 1.4 * DESCENT_S
    assert starved.stepped[-1] == ["other"]
    assert starved.stepped.index(["other"]) < len(starved.stepped) - starved.stepped[::-1].index(["met"])


def test_a_step_is_tried_again_without_what_worked_beside_it(runner: Runner, work: MakeWork) -> None:
    """Nothing is given up for it, neither its image nor a rung."""
    decoding, gate, way, told = Event(), Event(), Steps(), Told()

    def short(phase: str, size: int, side: int | None) -> bool:
        if phase == "decode" and not decoding.is_set():
            decoding.set()
            assert gate.wait(60)
        if phase == "step" and decoding.is_set() and not gate.is_set():
            gate.set()
            return True
        return False

    small = {"width": 32, "height": 32, "num_inference_steps": 1}
    with an_engine(Starved(runner, short), way, Rung.CPU) as (engine, metrics):
        first = submit(engine, told, work("first", **small))
        assert decoding.wait(60)
        second = submit(engine, told, work("second", guidance_scale=1.0, **small))
        assert len(second.result(60).images) == len(first.result(60).images) == 1
        assert metrics.value("tandem_engine_out_of_memory_total") == 1
    assert (way.taken, told.relief) == ([], {"first": [], "second": []})


def test_what_ran_out_beside_the_steps_of_a_rung_before_is_begun_anew(runner: Runner, work: MakeWork) -> None:
    """The loop hears of it after the way down, which has more memory for it: on the CPU's rung the VAE works beside the
    steps again. Both threads compute there as one that begins there has them."""
    decoding, stepping, way, told, on_cores = Event(), Event(), Steps(refused=LADDER[1:-1]), Told(), set[str]()

    def short(phase: str, size: int, side: int | None) -> bool:
        if phase == "decode" and not way.taken:
            decoding.set()
            return stepping.wait(60)
        if phase == "step" and decoding.is_set() and not way.taken:
            stepping.set()
            return True
        return False

    small = {"width": 32, "height": 32, "num_inference_steps": 1, "guidance_scale": 1.0}
    starved, profile = Starved(runner, short), Profile(4, [Curve((4, 4), {1: 1e-3, 8: 1e-3}, 1)])
    ladder = Ladder(Rung.RESIDENT, Rung.CPU, way)
    engine = Engine(
        starved,
        StepScheduler(profile),
        profile,
        InProcessMetrics(),
        ladder=ladder,
        on_cores=lambda: on_cores.add(current_thread().name),
    )
    first = submit(engine, told, work("first", **small))
    assert decoding.wait(60)
    second = submit(engine, told, work("second", **small))
    assert len(second.result(60).images) == len(first.result(60).images) == 1
    engine.stop()
    assert way.taken == [Rung.CPU]
    assert starved.threads["decode"] == {"vae"}
    assert told.relief == {"first": [], "second": [Relief("step", "cpu")]}
    assert on_cores == {"engine", "vae"}
    assert profile.step_ms((4, 4), 1) > 0.01, "what the card took is forgotten"


def test_a_descent_is_alone_with_the_vae() -> None:
    """Previews that wait are given first: the map behind them, and the weights that move, are not for two threads."""
    given: list[str] = []
    thread = VaeThread(lambda error: None)

    def first() -> None:
        while thread._tasks.qsize() < 2:  # until who settles waits as well
            assert not ended.is_set()
        given.append("first")

    ended = Event()
    thread.submit(first, preview=True)
    thread.submit(lambda: given.append("second"), preview=True)
    assert thread.settle() > 0
    ended.set()
    assert given == ["first", "second"]
    thread.close()
    thread.join(60)


def test_down_the_real_ladder_the_image_in_hand_stays_what_it_was(model: ModelFolder, work: MakeWork) -> None:
    """The first four steps down are switches; two OOMs on the way, in the middle of the image."""
    own = open_runner(model, DiffusionSettings(device="cpu", torch_threads=1))
    job = work("a", num_inference_steps=6, guidance_scale=1.0)
    expected, counts = drawn(own, job)[0], {"step": 0}

    def short(phase: str, size: int, side: int | None) -> bool:
        counts["step"] += phase == "step"
        return phase == "step" and counts["step"] in (3, 5, 6)

    with an_engine(Starved(own, short), lambda rung: descend(own.family, rung), Rung.OFFLOAD) as (engine, _):
        result = engine.submit(job, ignore).result(60)
        assert own.family.rung is engine.rung is result.rung is Rung.ATTENTION_SLICING
    assert difference(result.images[0], expected) <= 1


def test_what_a_model_is_loaded_on() -> None:
    metrics = InProcessMetrics()

    def load(rung: Rung) -> str:
        if LADDER.index(rung) < LADDER.index(Rung.INT8):
            raise OutOfMemory("no memory") if rung is Rung.RESIDENT else torch.OutOfMemoryError("CUDA out of memory")
        return rung.value

    assert first_that_loads(Rung.RESIDENT, Rung.CPU, load, metrics) == "int8"
    assert metrics.value("tandem_engine_out_of_memory_total", phase="load") == 4
    with pytest.raises(OutOfMemory, match="down to the rung vae_tiling"):
        first_that_loads(Rung.VAE_SLICING, Rung.VAE_TILING, load, metrics)

    def broken(rung: Rung) -> str:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="kernel"):
        first_that_loads(Rung.RESIDENT, Rung.CPU, broken, metrics)


def test_what_was_loaded_is_gone_before_the_next_rung_is_tried() -> None:
    """Models are full of cycles, which nobody would look for yet."""

    class Loaded:
        def __init__(self) -> None:
            self.me = self

    held: list[weakref.ref[Loaded]] = []

    def load(rung: Rung) -> str:
        if held:
            return "gone" if held[0]() is None else "there"
        loaded = Loaded()
        held.append(weakref.ref(loaded))
        raise OutOfMemory("no memory")

    gc.disable()
    try:
        assert first_that_loads(Rung.RESIDENT, Rung.VAE_SLICING, load, InProcessMetrics()) == "gone"
    finally:
        gc.enable()


def test_a_rung_whose_library_is_missing_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless it is the one that the operator names, or the last one."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    metrics = InProcessMetrics()

    def load(rung: Rung) -> Rung:
        check_library(rung)
        return rung

    assert first_that_loads(Rung.INT8, Rung.SEQUENTIAL_OFFLOAD, load, metrics) is Rung.OFFLOAD
    told = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert [each.partition(" is left out: ")[0] for each in told] == ["rung int8", "rung int4"]
    assert first_that_loads(Rung.INT4, Rung.OFFLOAD, load, metrics, asked=Rung.INT8) is Rung.OFFLOAD
    for worst, asked in ((Rung.INT4, None), (Rung.CPU, Rung.INT8)):
        with pytest.raises(OperatorError, match=r"diffusion.rung: int8 needs the package bitsandbytes") as refused:
            first_that_loads(Rung.INT8, worst, load, metrics, asked)
        assert refused.value.param == "diffusion.rung"

    def broken(rung: Rung) -> Rung:
        raise OperatorError("model.source: it is cut", "model.source")

    with pytest.raises(OperatorError, match="it is cut"):
        first_that_loads(Rung.INT8, Rung.CPU, broken, metrics)


def test_the_machines_own_memory_runs_out_as_a_cards() -> None:
    with pytest.raises(OutOfMemory, match="the VAE: the device ran out of memory"), device_errors("the VAE"):
        torch.empty(1 << 50)
    with pytest.raises(OutOfMemory), device_errors("the VAE"):
        raise MemoryError
    with pytest.raises(GenerationFailed, match="failed on this request"), device_errors("the VAE"):
        raise RuntimeError("no such kernel")


@pytest.mark.parametrize("examples", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_whatever_runs_out_every_run_ends_once(runner: Runner, work: MakeWork, examples: int) -> None:
    small = {"width": 32, "height": 32}
    jobs = [
        work("a", num_inference_steps=2, guidance_scale=1.0, **small),
        work("b", num_inference_steps=1, num_images=2, seed=2, **small),
        work("c", num_inference_steps=2, image=Image.new("RGB", (32, 32), "green"), seed=4, **small),
    ]

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.booleans(), max_size=24),
        st.sampled_from(["begin", "encode", "step", "decode", "all"]),
        st.lists(st.sampled_from(LADDER), max_size=3),
        st.sampled_from(LADDER),
    )
    def holds(failures: list[bool], where: str, refused: list[Rung], worst: Rung) -> None:
        left, way, told = list(failures), Steps(refused), Told()

        def short(phase: str, size: int, side: int | None) -> bool:
            return where in (phase, "all") and bool(left) and left.pop(0)

        starved, ends = Starved(runner, short), []
        with an_engine(starved, way, worst, batch=3) as (engine, metrics):
            futures = {job.run_id: submit(engine, told, job) for job in jobs}
            for name, future in futures.items():
                future.add_done_callback(lambda _, name=name: ends.append(name))
            errors = {name: future.exception(60) for name, future in futures.items()}
        assert sorted(ends) == ["a", "b", "c"]
        assert all(error is None or isinstance(error, OutOfMemory) for error in errors.values())
        ran_out = sum(failures[: len(failures) - len(left)])
        assert metrics.value("tandem_engine_out_of_memory_total") == ran_out
        assert sum(error is not None for error in errors.values()) <= ran_out
        assert way.taken == sorted(way.taken, key=LADDER.index)
        assert len(set(way.asked)) == len(way.asked)
        assert not starved._states, "an image's tensors were kept"
        for job in jobs:
            if errors[job.run_id] is None:
                assert len(futures[job.run_id].result().images) == job.request.num_images

    holds()
