"""The step loop on the shipped model: joining, leaving, overtaking, failing alone."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from threading import Event, Thread, current_thread

import pytest
import torch
from support.parity import difference, drawn, picture

from serve.diffusion.engine import Engine, Rendered, Work
from serve.diffusion.profile import Profile
from serve.diffusion.runner import Runner
from serve.diffusion.scheduler import Row, StepScheduler
from serve.domain.conditioning import Conditioning, Schedule
from serve.domain.jobs import StepEvent
from serve.encoders.export import conditioning_at
from serve.errors import DeviceLost, GenerationFailed, NotFinite, OutOfMemory
from serve.telemetry.metrics import InProcessMetrics

MakeWork = Callable[..., Work]


def ignore(event: StepEvent) -> None:
    pass


def open_engine(runner: Runner, max_batch_size: int = 4) -> Engine:
    profile = Profile(max_batch_size)
    return Engine(runner, StepScheduler(profile), profile, InProcessMetrics())


class WatchedRunner(Runner):
    """Keeps what stepped together; no step is made before `gate` is set."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.family)
        self.steps: list[list[Row]] = []
        self.under_way = Event()
        self.gate = Event()

    def step(self, rows: Sequence[Row], most: int | None = None) -> dict[Row, Exception]:
        self.steps.append(list(rows))
        self.under_way.set()
        assert self.gate.wait(60)
        return super().step(rows, most)


def test_a_4_step_job_behind_eight_50_step_jobs_finishes_first(runner: Runner, work: MakeWork) -> None:
    """And slows none of them by more than its own four steps."""
    watched = WatchedRunner(runner)
    engine = open_engine(watched, max_batch_size=8)
    ended: list[str] = []
    names = [*(f"long{n}" for n in range(8)), "short"]
    futures = []
    for name in names:
        job = work(name, num_inference_steps=4 if name == "short" else 50, width=64, height=64)
        future = engine.submit(job, ignore)
        future.add_done_callback(lambda _, name=name: ended.append(name))
        futures.append(future)
        assert watched.under_way.wait(60)
    watched.gate.set()
    wait(futures, 120)
    engine.stop()
    assert ended[0] == "short"
    assert len(ended) == 9
    # The first joined alone, so that its steps are one ahead of the others'.
    assert len(watched.steps) <= 1 + 50 + 4


def test_a_late_short_job_overtakes_a_long_one(engine: Engine, work: MakeWork) -> None:
    under_way = Event()
    ended: list[str] = []
    late = work("short", num_inference_steps=3)
    long = engine.submit(work("long", num_inference_steps=60), lambda event: under_way.set())
    assert under_way.wait(60)
    short = engine.submit(late, ignore)
    for name, future in (("long", long), ("short", short)):
        future.add_done_callback(lambda _, name=name: ended.append(name))
    wait([long, short], 120)
    assert ended == ["short", "long"]


def test_a_step_that_hangs_shows(runner: Runner, work: MakeWork) -> None:
    """So does a command that waits behind it; an engine with nothing to do is not still."""
    watched = WatchedRunner(runner)
    engine = open_engine(watched)
    assert engine.still_s == 0
    future = engine.submit(work("hangs", num_inference_steps=2), ignore)
    assert watched.under_way.wait(60)
    before = engine.still_s
    engine.cancel("nobody")
    assert engine.still_s > before > 0
    watched.gate.set()
    future.result(60)
    engine.stop()
    assert engine.still_s == 0


def test_the_slowest_known_step_is_that_of_what_is_in_hand(runner: Runner, work: MakeWork) -> None:
    watched, profile = WatchedRunner(runner), Profile(4)
    profile.learn((16, 16), 4, 300.0)
    profile.learn((64, 64), 2, 9000.0)
    engine = Engine(watched, StepScheduler(profile), profile, InProcessMetrics())
    assert engine.slowest_step_s == 0
    future = engine.submit(work("small", num_images=2, num_inference_steps=1), ignore)
    assert watched.under_way.wait(60)
    assert engine.slowest_step_s == pytest.approx(0.3)
    watched.gate.set()
    future.result(60)
    engine.stop()


def test_a_row_of_more_lanes_than_a_step_has_takes_the_longer(runner: Runner, work: MakeWork) -> None:
    watched, profile = WatchedRunner(runner), Profile(2)
    profile.learn((16, 16), 4, 300.0)
    engine = Engine(watched, StepScheduler(profile), profile, InProcessMetrics())
    job = work("wide", num_inference_steps=1)
    (phase,) = job.schedule.phases
    wide = replace(phase, positive=phase.positive * 7)
    future = engine.submit(
        replace(job, request=replace(job.request, composed=7), schedule=replace(job.schedule, phases=(wide,))),
        ignore,
    )
    assert watched.under_way.wait(60)
    assert engine.slowest_step_s == pytest.approx(0.6)
    watched.gate.set()
    future.result(60)
    engine.stop()


def test_steps_are_told_in_order(engine: Engine, work: MakeWork) -> None:
    told: list[StepEvent] = []
    rendered = engine.submit(work("told", num_inference_steps=5, num_images=2), told.append).result(60)
    assert told == [StepEvent("told", step, 5) for step in range(1, 6)]
    assert rendered.spent.steps_s > 0
    assert rendered.spent.vae_s > 0
    assert rendered.approximate == ()


def test_images_of_a_job_take_successive_seeds(engine: Engine, work: MakeWork) -> None:
    both = engine.submit(work("both", seed=7, num_images=2), ignore).result(60)
    second = engine.submit(work("second", seed=8), ignore).result(60)
    assert difference(both.images[1], second.images[0]) <= 1
    assert difference(both.images[0], second.images[0]) > 10


def test_cancel_frees_its_rows_within_one_step(runner: Runner, work: MakeWork) -> None:
    watched = WatchedRunner(runner)
    engine = open_engine(watched)
    gone = engine.submit(work("gone", num_inference_steps=150, num_images=2), ignore)
    assert watched.under_way.wait(60)
    stays = engine.submit(work("stays", num_inference_steps=6), ignore)
    engine.cancel("gone")  # while its first step is being made
    engine.cancel("nobody")
    watched.gate.set()
    with pytest.raises(GenerationFailed, match="cancelled"):
        gone.result(60)
    assert len(stays.result(60).images) == 1
    engine.stop()
    assert [{row.run_id for row in rows} for rows in watched.steps] == [{"gone"}, *[{"stays"}] * 6]


def test_a_run_that_is_here_is_not_begun_again(engine: Engine, work: MakeWork) -> None:
    under_way = Event()
    other = work("same")
    first = engine.submit(work("same", num_inference_steps=60), lambda event: under_way.set())
    assert under_way.wait(60)
    with pytest.raises(GenerationFailed):
        engine.submit(other, ignore).result(60)
    assert len(first.result(60).images) == 1


def test_not_a_number_fails_its_job_drawn(engine: Engine, work: MakeWork) -> None:
    good = work("good")
    text = conditioning_at(good.schedule, 0)
    nan = Schedule.constant(Conditioning(torch.full_like(text.positive, torch.nan), text.negative))
    bad, fine = engine.submit(replace(good, run_id="bad", schedule=nan), ignore), engine.submit(good, ignore)
    with pytest.raises(NotFinite, match="not-a-number"):
        bad.result(60)
    assert len(fine.result(60).images) == 1
    assert engine.alive


class Poisoned(WatchedRunner):
    """Any step with a row of the run `wrong` in it fails as a whole."""

    def step(self, rows: Sequence[Row], most: int | None = None) -> dict[Row, Exception]:
        if any(row.run_id == "wrong" for row in rows):
            self.steps.append(list(rows))
            self.under_way.set()
            assert self.gate.wait(60)
            raise RuntimeError("no such kernel")
        return super().step(rows, most)


def test_a_job_that_breaks_the_step_leaves_its_neighbours_unharmed(runner: Runner, work: MakeWork) -> None:
    poisoned = Poisoned(runner)
    engine = open_engine(poisoned)
    good = [work(f"good{n}", seed=n, num_inference_steps=6) for n in range(3)]
    futures = [engine.submit(job, ignore) for job in good]
    wrong = engine.submit(work("wrong"), ignore)
    poisoned.gate.set()
    with pytest.raises(GenerationFailed, match="the denoiser failed"):
        wrong.result(60)
    for job, future in zip(good, futures, strict=True):
        assert difference(future.result(60).images[0], drawn(runner, job)[0]) <= 1
    engine.stop()


class SmallDevice(WatchedRunner):
    """A device that has memory for so many lanes in one pass. `tried` are those of each step, and whether it was made;
    `wide` is a shape of which it has not even memory for one."""

    holds = 3
    wide = (24, 24)

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner)
        self.tried: list[tuple[int, bool]] = []

    def step(self, rows: Sequence[Row], most: int | None = None) -> dict[Row, Exception]:
        assert most is not None
        lanes = min(most, sum(row.lanes for row in rows))
        fits = lanes <= self.holds and rows[0].group.shape != self.wide
        self.tried.append((lanes, fits))
        if not fits:
            self.steps.append(list(rows))
            self.under_way.set()
            assert self.gate.wait(60)
            raise OutOfMemory("the denoiser: the device ran out of memory")
        return super().step(rows, most)


def test_out_of_memory_halves_the_batch_and_is_remembered(runner: Runner, work: MakeWork) -> None:
    small = SmallDevice(runner)
    profile, metrics = Profile(8), InProcessMetrics()
    engine = Engine(small, StepScheduler(profile), profile, metrics)
    jobs = [work(f"job{n}", seed=n, num_inference_steps=5, guidance_scale=3.0 * (n % 2)) for n in range(5)]
    futures = [engine.submit(job, ignore) for job in jobs]
    small.gate.set()
    for job, future in zip(jobs, futures, strict=True):
        assert difference(future.result(60).images[0], drawn(runner, job)[0]) <= 1
    engine.stop()
    too_large = [lanes for lanes, fits in small.tried if not fits]
    assert too_large
    assert len(too_large) <= 4, "the loop went on asking for more than there is"
    assert profile.lanes((16, 16)) <= small.holds
    assert profile.lanes((8, 8)) == 16
    assert metrics.value("tandem_engine_out_of_memory_total") == len(too_large)


@pytest.mark.parametrize(("prompts", "holds"), [(1, 1), (4, 1), (4, 2), (4, 3)])
def test_an_image_of_more_lanes_than_fit_makes_its_steps_in_parts_drawn(
    runner: Runner, work: MakeWork, prompts: int, holds: int
) -> None:
    """A guided one, a composition of four prompts; and from the second step on nobody asks for more than there is."""
    small, profile = SmallDevice(runner), Profile(4)
    small.holds = holds
    small.gate.set()
    plain = work("plain", num_inference_steps=4)
    (phase,) = plain.schedule.phases
    composed = replace(phase, positive=tuple((1 / prompts, mix) for _, mix in phase.positive * prompts))
    job = replace(
        plain,
        request=replace(plain.request, composed=prompts),
        schedule=replace(plain.schedule, phases=(composed,)),
    )
    engine = Engine(small, StepScheduler(profile), profile, InProcessMetrics())
    image = engine.submit(job, ignore).result(60).images[0]
    engine.stop()
    assert difference(image, drawn(runner, plain)[0]) <= 1
    assert [fits for _, fits in small.tried].count(True) == 4
    failed = [lanes for lanes, fits in small.tried if not fits]
    assert failed == sorted(set(failed), reverse=True) != []
    assert all(fits for _, fits in small.tried[len(failed) :])
    assert profile.lanes((16, 16)) <= holds


def test_an_image_that_never_fits_fails_drawn(runner: Runner, work: MakeWork) -> None:
    small = SmallDevice(runner)
    small.gate.set()
    engine = open_engine(small)
    wide = engine.submit(work("wide", width=192, height=192), ignore)
    fine = engine.submit(work("fine", num_inference_steps=2), ignore)
    with pytest.raises(OutOfMemory):
        wide.result(60)
    assert [lanes for lanes, fits in small.tried if not fits] == [2, 1]
    assert len(fine.result(60).images) == 1
    engine.stop()


class LostDevice(Runner):
    """A runner whose device fails at a step, as a real one does: for good."""

    def step(self, rows: Sequence[Row], most: int | None = None) -> dict[Row, Exception]:
        raise DeviceLost("the device failed")


def test_a_lost_device_ends_the_loop_and_every_future(runner: Runner, work: MakeWork) -> None:
    engine = open_engine(LostDevice(runner.family))
    futures = [engine.submit(work(f"lost{n}"), ignore) for n in range(3)]
    for future in futures:
        assert isinstance(future.exception(60), DeviceLost)
    engine.stop()
    assert not engine.alive
    assert isinstance(engine.submit(work("late"), ignore).exception(60), DeviceLost)
    assert isinstance(engine.measure((8, 8), 1, 1).exception(60), DeviceLost)
    assert engine.still_s == 0


class NoRemoval(StepScheduler):
    """One whose books are broken; keeps on which threads it was asked."""

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile)
        self.asked: list[str] = []

    def remove(self, run_id: str) -> None:
        self.asked.append(current_thread().name)
        raise RuntimeError("dictionary changed size during iteration")


def broken_engine(runner: Runner) -> tuple[Engine, NoRemoval]:
    profile = Profile(4)
    scheduler = NoRemoval(profile)
    return Engine(runner, scheduler, profile, InProcessMetrics()), scheduler


def test_every_future_has_its_outcome_even_if_letting_go_fails(runner: Runner, work: MakeWork) -> None:
    """When the device is lost, what may be broken as well is not touched."""
    watched = WatchedRunner(runner)
    engine, scheduler = broken_engine(watched)
    futures = [engine.submit(work(f"lost{n}", image=picture(128, 128) if n else None), ignore) for n in range(3)]
    assert watched.under_way.wait(60)
    asked = engine.measure((8, 8), 1, 3)
    watched.step = LostDevice.step.__get__(watched)  # type: ignore[method-assign]
    watched.gate.set()
    for future in [*futures, asked]:
        assert isinstance(future.exception(60), DeviceLost)
    engine.stop()
    assert not engine.alive
    assert scheduler.asked == []


def test_a_cancel_that_can_not_let_go_still_has_its_outcome(runner: Runner, work: MakeWork) -> None:
    watched = WatchedRunner(runner)
    engine, _ = broken_engine(watched)
    gone, other = (engine.submit(work(name), ignore) for name in ("gone", "other"))
    assert watched.under_way.wait(60)
    engine.cancel("gone")
    watched.gate.set()
    with pytest.raises(GenerationFailed, match="cancelled"):
        gone.result(60)
    assert isinstance(other.exception(60), DeviceLost)
    engine.stop()
    assert not engine.alive


def test_a_cancel_while_the_loop_ends_touches_nothing(runner: Runner, work: MakeWork) -> None:
    """The loop's thread is still at the runs when the first of their callers hears, and cancels another's."""
    watched = WatchedRunner(runner)
    engine, scheduler = broken_engine(watched)
    futures = [engine.submit(work(f"lost{n}"), ignore) for n in range(3)]
    assert watched.under_way.wait(60)

    def cancel_all(future: Future[Rendered]) -> None:
        thread = Thread(target=lambda: [engine.cancel(f"lost{n}") for n in range(3)])
        thread.start()
        thread.join(60)

    futures[0].add_done_callback(cancel_all)
    watched.step = LostDevice.step.__get__(watched)  # type: ignore[method-assign]
    watched.gate.set()
    for future in futures:
        assert isinstance(future.exception(60), DeviceLost)
    engine.stop()
    assert scheduler.asked == []


def test_a_callback_that_raises_fails_its_run_drawn(engine: Engine, work: MakeWork) -> None:
    def broken(event: StepEvent) -> None:
        raise RuntimeError("the event loop is closed")

    deaf = engine.submit(work("deaf"), broken)
    fine = engine.submit(work("fine"), ignore)
    with pytest.raises(GenerationFailed):
        deaf.result(60)
    assert len(fine.result(60).images) == 1
    assert engine.alive


def test_steps_are_measured_between_those_of_users(runner: Runner, work: MakeWork) -> None:
    watched = WatchedRunner(runner)
    engine = open_engine(watched)
    measured: list[int] = []
    future = engine.submit(work("user", num_inference_steps=5), lambda event: measured.append(len(calls)))
    assert watched.under_way.wait(60)
    calls: list[int] = []
    real = watched.measure
    watched.measure = lambda shape, lanes: (calls.append(lanes), real(shape, lanes))[1]  # type: ignore[method-assign]
    asked = engine.measure((16, 16), 4, steps=3)
    watched.gate.set()
    seconds = asked.result(60)
    assert len(seconds) == 3
    assert min(seconds) > 0
    assert len(future.result(60).images) == 1
    assert measured == [0, 0, 1, 2, 3], "more than one between two steps of the user"
    assert len(engine.measure((8, 8), 2, steps=2).result(60)) == 2, "and with nothing else to do"
    engine.stop()


def test_a_measurement_that_does_not_fit_fails_drawn(runner: Runner, work: MakeWork) -> None:
    watched = WatchedRunner(runner)
    watched.gate.set()

    def full(shape: tuple[int, int], lanes: int) -> float:
        raise OutOfMemory("the device ran out of memory")

    watched.measure = full  # type: ignore[method-assign]
    engine = open_engine(watched)
    with pytest.raises(OutOfMemory):
        engine.measure((16, 16), 64, 3).result(60)
    assert len(engine.submit(work("after"), ignore).result(60).images) == 1
    engine.stop()


def test_reused_predictions_are_counted(runner: Runner, work: MakeWork) -> None:
    metrics, profile = InProcessMetrics(), Profile(4)
    watched = WatchedRunner(runner)
    watched.gate.set()
    engine = Engine(watched, StepScheduler(profile), profile, metrics)
    engine.submit(work("exact", num_inference_steps=20), ignore).result(60)
    assert metrics.value("tandem_engine_reused_predictions_total") == 0
    cached = work("cached", num_inference_steps=20, step_cache=0.5)
    assert engine.submit(cached, ignore).result(60).approximate == ("step_cache",)
    engine.stop()
    assert 0 < watched.reused_predictions < 20
    assert metrics.value("tandem_engine_reused_predictions_total") == watched.reused_predictions


def test_stop_finishes_what_was_submitted(runner: Runner, work: MakeWork) -> None:
    metrics, profile = InProcessMetrics(), Profile(8)
    engine = Engine(runner, StepScheduler(profile), profile, metrics)
    futures: list[Future[Rendered]] = [engine.submit(work(f"last{n}", seed=n), ignore) for n in range(4)]
    engine.stop()
    assert all(future.done() and len(future.result().images) == 1 for future in futures)
    assert not engine.alive
    assert metrics.value("tandem_engine_steps_total") < 4 * 8, "the jobs did not step together"
    assert metrics.value("tandem_engine_decode_seconds") == 4
    assert profile.step_ms((16, 16), 8) > 0, "nothing was learned of the steps"
