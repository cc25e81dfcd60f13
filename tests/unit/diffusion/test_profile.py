"""The profile: which batch is the best, what a step takes, how long measuring may take, what is kept."""

import json
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from diffusers import AuraFlowTransformer2DModel, SD3Transformer2DModel
from hypothesis import given
from PIL import Image
from support.image_models import auraflow_model, sd3_model

from serve.diffusion import profiling
from serve.diffusion.curves import Curve, best_lanes, unmeasured_lanes
from serve.diffusion.profile import Profile, open_profile
from serve.diffusion.run import Picture
from serve.diffusion.runner import Latents, Runner, open_runner
from serve.errors import DeviceLost, GenerationFailed, OutOfMemory
from serve.models import ModelFolder, check_folder
from serve.rungs import Rung
from serve.settings.pools import DiffusionSettings

Ms = Callable[[tuple[int, int], int], float]
SETTINGS = DiffusionSettings(device="cpu", torch_threads=1)
shapes = st.tuples(st.integers(1, 64), st.integers(1, 64))


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class TimedRunner(Runner):
    """A real runner whose forward passes take the time that a test says, on a clock of the test's."""

    def __init__(self, runner: Runner, clock: Clock, ms: Ms) -> None:
        super().__init__(runner.family)
        self.clock = clock
        self.ms = ms
        self.calls: list[tuple[tuple[int, int], int]] = []

    def measure(self, shape: tuple[int, int], lanes: int) -> float:
        self.calls.append((shape, lanes))
        seconds = self.ms(shape, lanes) / 1000
        self.clock.now_s += seconds
        return seconds


@pytest.fixture
def timed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Callable[[Ms], TimedRunner]:
    clock = Clock()
    monkeypatch.setattr(profiling, "time", clock)
    return lambda ms: TimedRunner(runner, clock, ms)


def flat_to_8(shape: tuple[int, int], lanes: int) -> float:
    """Lanes are free up to 8, then in proportion; larger shapes likewise by load."""
    return 10.0 * max(1.0, lanes * shape[0] * shape[1] / (8 * 256))


@pytest.mark.parametrize(
    ("ms", "best"),
    [
        ({1: 10}, 1),
        ({1: 10, 2: 10, 4: 10, 8: 10, 16: 10}, 16),
        ({1: 10, 2: 20, 4: 40, 8: 80}, 1),
        ({1: 10, 2: 11, 4: 13, 8: 25.8, 16: 52}, 4),
        ({1: 10, 2: 20.5, 4: 13, 8: 14}, 8),  # one that came out slow by chance hides none behind it
        ({2: 10, 4: 19.7}, 4),  # 1.5 % for the next image
        ({2: 10, 4: 19.9}, 2),  # 0.5 %
    ],
)
def test_a_batch_grows_while_the_next_image_adds_one_per_cent(ms: dict[int, float], best: int) -> None:
    assert best_lanes(ms) == best


def test_caps_and_times_follow_from_what_was_measured(
    timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path
) -> None:
    runner = timed(flat_to_8)
    profile = open_profile(runner, model, SETTINGS, tmp_path)
    assert runner.calls[0] == ((16, 16), 1), "the default size comes first"
    assert profile.lanes((16, 16)) == 8
    assert profile.lanes((8, 8)) == 16, "no step has more than twice `max_batch_size` lanes"
    assert profile.lanes((32, 32)) == 2
    for shape, lanes in [((16, 16), 4), ((16, 16), 16), ((16, 16), 12), ((32, 32), 3), ((64, 64), 4)]:
        assert profile.step_ms(shape, lanes) == pytest.approx(flat_to_8(shape, lanes), rel=0.01)
    assert profile.step_ms((20, 20), 8) == pytest.approx(flat_to_8((20, 20), 8), rel=0.2)


@given(
    curves=st.lists(
        st.tuples(shapes, st.dictionaries(st.integers(1, 16), st.floats(0.1, 1e4), min_size=1), st.integers(1, 16)),
        max_size=4,
        unique_by=lambda entry: entry[0][0] * entry[0][1],
    ),
    learned=st.lists(st.tuples(shapes, st.integers(1, 16), st.floats(0.01, 1e5)), max_size=8),
    limits=st.lists(st.tuples(shapes, st.integers(1, 16)), max_size=4),
    asked=st.tuples(shapes, st.integers(1, 16)),
)
def test_every_shape_has_a_cap_and_a_time(
    curves: list[tuple[tuple[int, int], dict[int, float], int]],
    learned: list[tuple[tuple[int, int], int, float]],
    limits: list[tuple[tuple[int, int], int]],
    asked: tuple[tuple[int, int], int],
) -> None:
    profile = Profile(8, [Curve(*entry) for entry in curves])
    for entry in learned:
        profile.learn(*entry)
    for shape, lanes in limits:
        profile.limit(shape, lanes)
        assert profile.lanes(shape) < lanes or lanes == 1
    assert 1 <= profile.lanes(asked[0]) <= 16
    assert profile.step_ms(*asked) >= 0
    assert (profile.step_ms(*asked) > 0) == bool(curves or any(shape == asked[0] for shape, _, _ in learned))


def test_measured_times_are_given_back() -> None:
    curves = [Curve((16, 16), {1: 3.0, 4: 5.0}, 4), Curve((32, 32), {1: 9.0, 2: 14.0}, 2)]
    profile = Profile(8, curves)
    for curve in curves:
        assert profile.lanes(curve.shape) == curve.cap
        for lanes, ms in curve.ms.items():
            assert profile.step_ms(curve.shape, lanes) == ms
    assert profile.step_ms((16, 16), 2) == pytest.approx(3 + 2 / 3)
    assert profile.step_ms((16, 16), 16) == 20.0
    assert profile.lanes((22, 22)) in (2, 3, 4), "between two areas, between their caps"


def test_steps_refine_what_was_measured() -> None:
    profile = Profile(8, [Curve((16, 16), {1: 10.0, 8: 40.0}, 8)])
    profile.learn((24, 24), 4, 90.0)
    assert profile.step_ms((24, 24), 4) == 90.0, "the first of a size and batch is believed"
    assert profile.step_ms((24, 24), 8) > 90.0, "and moves its neighbours along"
    assert profile.step_ms((16, 16), 8) == 40.0
    for _ in range(60):
        profile.learn((24, 24), 4, 60.0)
    assert profile.step_ms((24, 24), 4) == pytest.approx(60.0, rel=0.01)
    profile.learn((24, 24), 4, 1e6)
    assert profile.step_ms((24, 24), 4) < 80.0, "one step that took minutes says little"
    profile.learn((16, 16), 8, 50.0)
    assert profile.step_ms((16, 16), 8) == pytest.approx(41.0), "what was measured is moved by a tenth"
    for number in range(1000):
        profile.learn((number + 1, 7), 2, 5.0)
    assert profile.step_ms((1000, 7), 2) == 5.0
    assert profile.step_ms((24, 24), 4) == pytest.approx(45.0), "only so many sizes are remembered"


def test_without_memory_the_cap_falls_for_that_size_and_larger_ones() -> None:
    profile = Profile(8)
    profile.limit((32, 32), 8)
    assert profile.lanes((32, 32)) == 6
    assert profile.lanes((64, 32)) == 3
    assert profile.lanes((31, 31)) == 16
    profile.limit((32, 32), 6)
    assert profile.lanes((32, 32)) == 4
    profile.limit((32, 32), 16)
    assert profile.lanes((32, 32)) == 4, "a limit only falls"
    profile.limit((32, 32), 1)
    assert profile.lanes((32, 32)) == 1


def test_a_slow_device_stops_at_its_budget(
    timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path
) -> None:
    """After one measurement; nobody then waits for a batch that was never tried and may take minutes."""
    runner = timed(lambda shape, lanes: 60_000.0 * lanes)
    profile = open_profile(runner, model, SETTINGS, tmp_path)
    assert runner.calls == [((16, 16), 1)]
    assert profile.step_ms((16, 16), 1) == 60_000.0
    assert profile.lanes((16, 16)) == 1


def test_the_budget_is_kept(timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path) -> None:
    runner = timed(lambda shape, lanes: 900.0 * lanes)
    before_s = runner.clock.now_s
    open_profile(runner, model, SETTINGS, tmp_path)
    assert runner.clock.now_s - before_s <= SETTINGS.profile_s + 16 * 0.9
    assert len({lanes for _, lanes in runner.calls}) > 2


def test_a_compiler_s_time_is_not_a_step_s(
    timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path
) -> None:
    """The first forward pass of each batch compiles for a minute: that is no reason to step one image at a time."""
    seen: set[tuple[tuple[int, int], int]] = set()

    def ms(shape: tuple[int, int], lanes: int) -> float:
        first = (shape, lanes) not in seen
        seen.add((shape, lanes))
        return 60_000.0 if first else 20.0

    profile = open_profile(timed(ms), model, SETTINGS.model_copy(update={"compile": True}), tmp_path)
    assert profile.step_ms((16, 16), 1) == 20.0
    assert profile.lanes((16, 16)) == 16


def test_time_that_ran_out_allows_what_takes_no_long_step() -> None:
    assert unmeasured_lanes({1: 50.0}) == 40
    assert unmeasured_lanes({1: 1500.0}) == 1
    assert unmeasured_lanes({1: 3000.0, 2: 3000.0}) == 2


def test_memory_bounds_the_batch(timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path) -> None:
    runner = timed(lambda shape, lanes: 10.0)
    small = SETTINGS.model_copy(update={"max_pixels": 128 * 128})
    profile = open_profile(runner, model, small, tmp_path, lambda: lanes_share(runner))
    assert profile.lanes((16, 16)) == 8
    assert max(height * width for (height, width), _ in runner.calls) == 256, "larger than is drawn here"


def lanes_share(runner: TimedRunner) -> float:
    """The weights take a tenth, a lane of the default size six hundredths."""
    if not runner.calls:
        return 0.1
    (height, width), lanes = runner.calls[-1]
    return 0.1 + 0.06 * lanes * height * width / 256


def test_a_batch_that_does_not_fit_ends_the_search(
    timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path
) -> None:
    def ms(shape: tuple[int, int], lanes: int) -> float:
        if lanes * shape[0] * shape[1] > 4 * 256:
            raise OutOfMemory("the device ran out of memory")
        return 10.0

    profile = open_profile(timed(ms), model, SETTINGS, tmp_path)
    assert profile.lanes((16, 16)) == 4
    assert profile.lanes((32, 32)) == 1
    assert profile.lanes((128, 128)) == 1


@pytest.mark.parametrize("error", [GenerationFailed("no such kernel"), IndexError("position 33"), ValueError("33")])
def test_a_size_that_can_not_be_stepped_is_not_measured(
    timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path, error: Exception
) -> None:
    failing = (24, 24)

    def ms(shape: tuple[int, int], lanes: int) -> float:
        if shape == failing:
            raise error
        return flat_to_8(shape, lanes)

    runner = timed(ms)
    profile = open_profile(runner, model, SETTINGS, tmp_path)
    assert {shape for shape, _ in runner.calls} == {(8, 8), (16, 16), (24, 24), (32, 32)}
    assert profile.lanes((16, 16)) == 8
    failing = (16, 16)
    with pytest.raises(type(error)):
        open_profile(timed(ms), model, SETTINGS, tmp_path / "other")


def test_a_device_that_is_lost_is_no_size_to_leave_out(
    timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path
) -> None:
    def ms(shape: tuple[int, int], lanes: int) -> float:
        if shape == (24, 24):
            raise DeviceLost("the device failed")
        return 10.0

    with pytest.raises(DeviceLost):
        open_profile(timed(ms), model, SETTINGS, tmp_path)


@pytest.mark.parametrize("build", [auraflow_model, sd3_model])
def test_no_size_is_measured_that_the_model_has_no_positions_for(build: Callable[[Path], Path], tmp_path: Path) -> None:
    """Positions end at the default size; diffusers' AuraFlow raises IndexError beyond, its SD 3 ValueError."""
    folder = build(tmp_path / build.__name__)
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    side = config["sample_size"] // config["patch_size"]
    config["pos_embed_max_size"] = side if build is sd3_model else side**2
    denoiser = (SD3Transformer2DModel if build is sd3_model else AuraFlowTransformer2DModel).from_config(config)
    denoiser.save_pretrained(folder / "transformer")
    model = check_folder(folder, folder.name)
    settings = SETTINGS.model_copy(update={"profile_s": 2.0, "max_batch_size": 1})
    runner = open_runner(model, settings)
    measured: set[tuple[int, int]] = set()
    real = runner.measure
    runner.measure = lambda shape, lanes: (measured.add(shape), real(shape, lanes))[1]  # type: ignore[method-assign]
    open_profile(runner, model, settings, tmp_path)
    default = config["sample_size"]
    assert measured == {(default, default), (default // 2, default // 2)}
    with pytest.raises((IndexError, ValueError)):
        real((2 * default, 2 * default), 1)


class Memory:
    """Of the device: the highest share in use since it was last asked for, as CUDA keeps it."""

    def __init__(self, resting: float = 0.3) -> None:
        self.resting = self.peak = resting

    def __call__(self) -> float:
        peak, self.peak = self.peak, self.resting
        return peak


@pytest.mark.parametrize(("decoding", "lane", "cap"), [(2.0, 0.05, 8), (0.3, 0.06, 4), (0.55, 0.1, 1), (0.2, 0.5, 1)])
def test_what_decoding_takes_costs_lanes_but_no_curve(
    timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path, decoding: float, lane: float, cap: int
) -> None:
    """Of a device of 1, of which 0.3 are taken: one that decoding doesn't fit beside anything, one with room for it,
    and two in which even one lane beside it is too much."""
    memory = Memory()

    def ms(shape: tuple[int, int], lanes: int) -> float:
        memory.peak = max(memory.peak, memory.resting + lane * lanes)
        return 10.0

    def decode(latents: Latents, side: int | None = None) -> Picture:
        memory.peak = max(memory.peak, min(0.98, memory.resting + decoding))
        if memory.resting + decoding > 1:
            raise OutOfMemory("the VAE: the device ran out of memory")
        return Image.new("RGB", (8, 8))

    runner = timed(ms)
    runner.decode = decode  # type: ignore[method-assign]
    small = SETTINGS.model_copy(update={"max_pixels": 128 * 128})
    profile = open_profile(runner, model, small, tmp_path, memory)
    assert profile.step_ms((16, 16), 1) == 10.0
    assert profile.lanes((16, 16)) == cap


@pytest.mark.parametrize(("rung", "cap"), [(Rung.RESIDENT, 4), (Rung.VAE_SLICING, 16)])
def test_as_many_lanes_are_measured_as_were_planned(
    timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path, rung: Rung, cap: int
) -> None:
    """SDXL on 11 GB, in GB of its budget: two images a step where the VAE decodes beside it. Between two steps it costs
    no lanes, and nothing is decoded to know how many."""
    budget, memory = 9.9, Memory(5.47 / 9.9)

    def ms(shape: tuple[int, int], lanes: int) -> float:
        memory.peak = max(memory.peak, (5.47 + 0.33 * lanes / 2) / budget)
        return 10.0

    def decode(latents: Latents, side: int | None = None) -> Picture:
        assert rung is Rung.RESIDENT
        memory.peak = max(memory.peak, (5.47 + 3.76) / budget)
        return Image.new("RGB", (8, 8))

    runner = timed(ms)
    runner.family = copy(runner.family)
    runner.family.rung = rung
    runner.decode = decode  # type: ignore[method-assign]
    small = SETTINGS.model_copy(update={"max_pixels": 128 * 128})
    assert open_profile(runner, model, small, tmp_path, memory).lanes((16, 16)) == cap


@pytest.mark.parametrize(("allowed", "share"), [(1.0, 1.0), (0.9, 1.0), (0.5, 1.8)])
def test_memory_is_a_share_of_the_budget_or_of_what_a_plan_would_use(
    monkeypatch: pytest.MonkeyPatch, allowed: float, share: float
) -> None:
    """A budget has its margin of the card already."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 9e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10**10))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: allowed)
    assert profiling.peak_memory(torch.device("cuda")) == pytest.approx(share)


def test_where_steps_take_another_time_none_is_known(timed: Callable[[Ms], TimedRunner]) -> None:
    """And a size begins with one image, however many took part in a step before."""
    shape = (16, 16)
    profile = Profile(4, [Curve(shape, {1: 10.0, 8: 20.0}, 4)], too_large=[(64, 64)])
    profile.learn(shape, 4, 12.0)
    profile.limit(shape, 4)
    profile.relax(times=False)
    assert (profile.lanes(shape), profile.step_ms(shape, 4)) == (4, 12.0)
    profile.relax(times=True)
    assert (profile.lanes(shape), profile.step_ms(shape, 4), profile.curves(9)) == (2, 0.0, ())
    profile.learn(shape, 2, 60_000.0)
    assert profile.step_ms(shape, 2) == 60_000.0, "the first one is believed, however slow"
    assert (profile.lanes(shape), profile.step_ms(shape, 8)) == (8, 240_000.0)


def test_a_size_of_which_none_fits_is_bound_to_one(
    timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path
) -> None:
    """And the next start knows it from the file."""

    def ms(shape: tuple[int, int], lanes: int) -> float:
        if shape[0] >= 16:
            raise OutOfMemory("the device ran out of memory")
        return 10.0

    runner = timed(ms)
    for profile in (
        open_profile(runner, model, SETTINGS, tmp_path),
        open_profile(timed(nothing), model, SETTINGS, tmp_path),
    ):
        assert profile.lanes((8, 8)) == 16
        assert profile.lanes((16, 16)) == profile.lanes((32, 32)) == 1
    assert [shape for shape, _ in runner.calls if shape[0] >= 16] == [(16, 16)], "what is larger does not fit either"


def nothing(shape: tuple[int, int], lanes: int) -> float:
    raise AssertionError("measured again")


def test_a_profile_is_measured_once(timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path) -> None:
    first = open_profile(timed(flat_to_8), model, SETTINGS, tmp_path)
    again = open_profile(timed(nothing), model, SETTINGS, tmp_path)
    assert again.lanes((20, 20)) == first.lanes((20, 20))
    assert again.step_ms((20, 20), 3) == first.step_ms((20, 20), 3)
    assert [file.suffix for file in (tmp_path / "profiles").iterdir()] == [".json"]


@pytest.mark.parametrize("other", [{"max_batch_size": 2}, {"channels_last": False}, {"num_gpus": 0.5}])
def test_what_a_step_depends_on_has_a_profile_of_its_own(
    timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path, other: dict[str, object]
) -> None:
    open_profile(timed(flat_to_8), model, SETTINGS, tmp_path)
    runner = timed(flat_to_8)
    open_profile(runner, model, SETTINGS.model_copy(update=other), tmp_path)
    assert runner.calls


def test_other_weights_have_a_profile_of_their_own(
    timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path
) -> None:
    open_profile(timed(flat_to_8), model, SETTINGS, tmp_path / "data")
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        for file in (model.path / part).iterdir():
            (tmp_path / part / file.name).write_bytes(file.read_bytes())
    open_profile(timed(nothing), replace(model, path=tmp_path), SETTINGS, tmp_path / "data")
    for part in ("unet", "vae"):
        with (tmp_path / part / "config.json").open("a") as config:
            config.write(" ")
        runner = timed(flat_to_8)
        open_profile(runner, replace(model, path=tmp_path), SETTINGS, tmp_path / "data")
        assert runner.calls


def test_a_bound_on_sizes_that_leaves_out_none_measures_nothing_again(
    timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path
) -> None:
    open_profile(timed(flat_to_8), model, SETTINGS, tmp_path)
    open_profile(timed(nothing), model, SETTINGS.model_copy(update={"max_pixels": 2048**2}), tmp_path)
    runner = timed(flat_to_8)
    open_profile(runner, model, SETTINGS.model_copy(update={"max_pixels": 128**2}), tmp_path)
    assert runner.calls


def test_one_that_was_cut_short_is_measured_again_with_more_time(
    timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path
) -> None:
    slow = timed(lambda shape, lanes: 3000.0)
    open_profile(slow, model, SETTINGS, tmp_path)
    open_profile(timed(nothing), model, SETTINGS, tmp_path)
    patient = SETTINGS.model_copy(update={"profile_s": 2000.0})
    assert open_profile(timed(lambda shape, lanes: 3000.0), model, patient, tmp_path).lanes((16, 16)) == 16
    open_profile(timed(nothing), model, patient, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"cut_s": null, "too_large": [], "curves": [{"shape": [16, 16], "cap": 0, "ms": {"1": 1.0}}]}',
        b'{"cut_s": null, "too_large": [], "curves": [{"shape": [16, 16], "cap": 4, "ms": {}}]}',
        b'{"cut_s": null, "too_large": [], "curves": [{"shape": [16, 16], "cap": 4, "ms": {"1": NaN}}]}',
        b'{"cut_s": null, "too_large": [], "curves": [{"shape": [16], "cap": 4, "ms": {"1": 1.0}}]}',
        b'{"cut_s": null, "too_large": [[0, 1]], "curves": [{"shape": [16, 16], "cap": 4, "ms": {"1": 1.0}}]}',
    ],
)
def test_a_broken_file_is_measured_again(
    timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path, content: bytes
) -> None:
    open_profile(timed(flat_to_8), model, SETTINGS, tmp_path)
    (file,) = (tmp_path / "profiles").iterdir()
    file.write_bytes(content)
    assert open_profile(timed(flat_to_8), model, SETTINGS, tmp_path).lanes((16, 16)) == 8
    assert open_profile(timed(nothing), model, SETTINGS, tmp_path).lanes((16, 16)) == 8


def test_a_folder_that_can_not_be_written_costs_only_the_measuring(
    timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path
) -> None:
    (tmp_path / "profiles").write_text("in the way")
    assert open_profile(timed(flat_to_8), model, SETTINGS, tmp_path).lanes((16, 16)) == 8


def test_no_time_means_no_measuring(timed: Callable[[Ms], TimedRunner], model: ModelFolder, tmp_path: Path) -> None:
    profile = open_profile(timed(nothing), model, SETTINGS.model_copy(update={"profile_s": 0.0}), tmp_path)
    assert profile.lanes((16, 16)) == 16
    assert profile.step_ms((16, 16), 2) == 0.0
    assert not (tmp_path / "profiles").exists()


def test_the_real_runner_is_measured(runner: Runner, model: ModelFolder, tmp_path: Path) -> None:
    profile = open_profile(runner, model, SETTINGS.model_copy(update={"profile_s": 1.0}), tmp_path)
    assert profile.step_ms((16, 16), 2) > 0
    assert profile.step_ms((16, 16), 16) > profile.step_ms((16, 16), 1)
