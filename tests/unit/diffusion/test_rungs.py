"""The rungs of the memory ladder: what each computes, and the way down with images in hand."""

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.image_models import BUILDERS

from serve.bench.footprints import allocated
from serve.devices import use_threads
from serve.diffusion import rungs, vae
from serve.diffusion.families import open_family
from serve.diffusion.families.base import Family
from serve.diffusion.families.speed import blocks
from serve.diffusion.run import Work
from serve.diffusion.rungs import descend
from serve.diffusion.runner import Runner, open_runner
from serve.diffusion.scheduler import Row
from serve.diffusion.synthetic import synthetic_lanes
from serve.errors import DeviceLost, GenerationFailed, OperatorError, OutOfMemory
from serve.models import ModelFolder, check_folder
from serve.quantize import BlockwiseLinear, load_library, packed
from serve.rungs import LADDER, MEANS, Rung
from serve.settings.pools import DiffusionSettings

MakeWork = Callable[..., Work]
CPU = torch.device("cpu")
SETTINGS = DiffusionSettings(device="cpu", torch_threads=1)
pytestmark = pytest.mark.usefixtures("quick_gc")
EXACT = [rung for rung in LADDER if MEANS[rung].weights == "plain"]
BELOW = LADDER[1:]
"""Every rung that something can go down to."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    use_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ModelFolder]:
    root = tmp_path_factory.mktemp("models")
    return {name: check_folder(build(root / name), name) for name, build in BUILDERS.items()}


def opened(model: ModelFolder, rung: Rung = Rung.RESIDENT, settings: DiffusionSettings = SETTINGS) -> Family:
    return open_family(model, CPU, torch.float32, settings, rung)


@torch.inference_mode()
def output(family: Family) -> torch.Tensor:
    """Of the second forward pass: by then an offloaded denoiser knows what comes next."""
    lanes = synthetic_lanes(family, (8, 12), 2)
    family.predict(lanes)
    return family.predict(lanes)


def check(family: Family, expected: torch.Tensor) -> None:
    """Near `expected` as its rung promises, and with the weights that it says."""
    error = float((output(family) - expected).norm() / expected.norm())
    means = MEANS[family.rung]
    bits = [m.bits for m in family.denoiser.modules() if isinstance(m, BlockwiseLinear)]
    inside = [m for block in blocks(family.denoiser) for m in block.modules() if isinstance(m, torch.nn.Linear)]
    assert (family.offload is None) is (means.offload == "none")
    assert family.vae.tile == means.tile
    if means.weights == "plain":
        assert not bits
        assert not family.packed
        assert error < 1e-5
    else:
        assert family.packed == (means.weights,)
        assert set(bits) == {8 if means.weights == "int8" else 4}
        assert not inside, "every linear layer of the blocks is packed"
        assert 0 < error < (0.05 if means.weights == "int8" else 1)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_every_family_opens_packed_and_offloaded(folders: Mapping[str, ModelFolder], name: str) -> None:
    expected = output(opened(folders[name]))
    for rung in (Rung.INT8, Rung.INT4, Rung.OFFLOAD, Rung.SEQUENTIAL_OFFLOAD):
        check(opened(folders[name], rung), expected)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_every_family_goes_down_rung_by_rung(folders: Mapping[str, ModelFolder], name: str) -> None:
    family = opened(folders[name])
    expected = output(family)
    for rung in BELOW:
        descend(family, rung)
        assert family.rung == rung
        check(family, expected)


@pytest.mark.parametrize(
    ("start", "to"),
    [
        (Rung.RESIDENT, Rung.INT4),
        (Rung.RESIDENT, Rung.SEQUENTIAL_OFFLOAD),
        (Rung.RESIDENT, Rung.CPU),
        (Rung.INT8, Rung.OFFLOAD),
        (Rung.INT8, Rung.CPU),
        (Rung.OFFLOAD, Rung.CPU),
    ],
)
def test_rungs_may_be_left_out(folders: Mapping[str, ModelFolder], start: Rung, to: Rung) -> None:
    family = opened(folders["sdxl"], start)
    descend(family, to)
    check(family, output(opened(folders["sdxl"])))


@pytest.mark.parametrize(("rung", "to"), [(Rung.INT8, Rung.INT8), (Rung.OFFLOAD, Rung.VAE_TILING)])
def test_there_is_no_way_up(folders: Mapping[str, ModelFolder], rung: Rung, to: Rung) -> None:
    family = opened(folders["sd"], rung)
    with pytest.raises(ValueError, match=f"{to} is not below {rung}"):
        descend(family, to)
    assert family.rung == rung


def test_a_tile_that_was_chosen_smaller_stays(folders: Mapping[str, ModelFolder]) -> None:
    family = opened(folders["sd"])
    family.vae.tile = 768
    descend(family, Rung.VAE_SLICING)
    assert family.vae.tile == 768
    descend(family, Rung.INT8)
    assert family.vae.tile == 512


def test_packing_holds_one_layer_twice_at_most(folders: Mapping[str, ModelFolder]) -> None:
    """Counted by torch's allocator, which knows what it gave while it was watched: so the weights are copied first."""
    family = opened(folders["flux"])
    parameters = list(family.denoiser.parameters())
    sizes = [m.weight.nbytes for m in family.denoiser.modules() if isinstance(m, torch.nn.Linear)]
    whole = sum(each.nbytes for each in parameters)

    def copy_and_pack(_: torch.nn.Module) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.clone()
        parameters.clear()
        descend(family, Rung.INT8)

    load_library()  # which makes tensors of its own
    most = allocated(family.denoiser, copy_and_pack) - whole
    assert most < max(sizes) < 0.3 * sum(sizes) / 4, "not all of them beside those that they replace"


def drawn(runner: Runner, work: Work, down: Mapping[int, Rung]) -> tuple[np.ndarray, list[Row]]:
    """The work's image; before the steps with these numbers, the family goes down."""
    (row,) = rows = runner.rows(work)
    runner.begin(row, work, runner.encode(work))
    for step in range(row.steps):
        if step in down:
            descend(runner.family, down[step])
        assert not runner.step(rows)
    return np.asarray(runner.decode(runner.release(row)), dtype=float), rows


def test_an_image_in_hand_goes_on_through_all_rungs(model: ModelFolder, runner: Runner, work: MakeWork) -> None:
    """On the shipped model; 8 steps have room for a rung before each."""
    job = work("down", num_inference_steps=9, seed=7)
    expected, _ = drawn(runner, job, {})
    through, _ = drawn(open_runner(model, SETTINGS), job, dict(enumerate(EXACT[1:], 2)))
    assert np.abs(through - expected).max() <= 1
    packed, _ = drawn(open_runner(model, SETTINGS), job, dict(enumerate(BELOW, 1)))
    assert 0 < np.abs(packed - expected).mean() < 12


def test_without_the_library_the_rung_names_its_setting_and_is_passed_over_later(
    folders: Mapping[str, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = opened(folders["sd"])
    expected = output(family)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(OperatorError, match=r"diffusion.rung: int8 needs .*bitsandbytes") as refused:
        opened(folders["sd"], Rung.INT8)
    assert refused.value.param == "diffusion.rung"
    with pytest.raises(GenerationFailed, match="int8"):
        descend(family, Rung.INT8)
    assert family.rung == Rung.RESIDENT
    check(family, expected)
    descend(family, Rung.OFFLOAD)
    check(family, expected)


def test_weights_that_are_gone_leave_the_family_as_it_was(tmp_path: Path) -> None:
    """From packed weights on, those of offloading are read from the folder once more."""
    model = check_folder(BUILDERS["sd3"](tmp_path / "sd3"), "sd3")
    family = opened(model, Rung.INT8)
    expected = output(family)
    for file in (tmp_path / "sd3" / "transformer").glob("*.safetensors"):
        file.unlink()
    for rung in (Rung.OFFLOAD, Rung.CPU):
        with pytest.raises(GenerationFailed, match=str(rung)):
            descend(family, rung)
        assert family.rung == Rung.INT8
        assert torch.equal(output(family), expected)
    descend(family, Rung.INT4)
    assert family.rung == Rung.INT4


@pytest.mark.parametrize(("to", "dtype"), [(Rung.OFFLOAD, torch.float32), (Rung.CPU, torch.float16)])
def test_layers_that_a_failed_packing_has_left_are_known_and_go_with_the_next_rung(
    folders: Mapping[str, ModelFolder], to: Rung, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = open_family(folders["sd"], CPU, dtype, SETTINGS, Rung.RESIDENT)
    expected, functional, left = output(family), load_library().functional, [True] * 5
    real = functional.quantize_blockwise

    def scarce(*args: object, **options: object) -> object:
        if not left:
            raise torch.OutOfMemoryError("none left")
        left.pop()
        return real(*args, **options)

    monkeypatch.setattr(functional, "quantize_blockwise", scarce)
    with pytest.raises(OutOfMemory):
        descend(family, Rung.INT8)
    assert (family.rung, family.packed) == (Rung.RESIDENT, ("int8",))
    assert not torch.equal(output(family), expected)
    descend(family, to)
    assert family.packed == packed(family.denoiser) == ()
    assert float((output(family) - expected).norm() / expected.norm()) < (1e-5 if dtype == torch.float32 else 0.02)


def test_timesteps_reach_the_cpu_as_they_are(folders: Mapping[str, ModelFolder]) -> None:
    """bfloat16 has no 958, and what a U-Net is told is the next one that it has: of another noise level."""
    family = open_family(folders["sd"], CPU, torch.bfloat16, SETTINGS, Rung.RESIDENT)
    lanes = [replace(lane, timestep=torch.tensor(958.3)) for lane in synthetic_lanes(family, (8, 12), 2)]
    with torch.inference_mode():
        expected = family.predict(lanes)
        descend(family, Rung.CPU)
        assert torch.equal(family.predict(lanes), expected)


@pytest.mark.parametrize(
    ("start", "fails"),
    [
        (Rung.RESIDENT, "the denoiser"),
        (Rung.RESIDENT, "the VAE"),
        (Rung.INT8, "the VAE"),
        (Rung.OFFLOAD, "the denoiser"),
    ],
)
def test_a_way_to_the_cpu_that_fails_leaves_the_family_as_it_was(
    folders: Mapping[str, ModelFolder], start: Rung, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16, which it is no more in by then."""
    family = open_family(folders["sd"], CPU, torch.float16, SETTINGS, start)
    before, (module, name) = output(family), (rungs, "to_cpu") if fails == "the denoiser" else (vae, "_cast")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, done_but_failed_once(getattr(module, name)))
        with pytest.raises(OutOfMemory):
            descend(family, Rung.CPU)
    assert family.rung == start
    assert torch.equal(output(family), before)
    assert (family.offload is not None) is (start is Rung.OFFLOAD)
    descend(family, Rung.CPU)
    assert family.offload is None
    assert {each.dtype for each in family.denoiser.parameters()} == {torch.float32}


def done_but_failed_once(work: Callable[..., object]) -> Callable[..., object]:
    left = [True]

    def once(*args: object) -> object:
        found = work(*args)
        if left:
            left.pop()
            raise torch.OutOfMemoryError("none left")
        return found

    return once


@pytest.mark.parametrize("start", [Rung.RESIDENT, Rung.INT8])
def test_a_family_that_can_not_go_back_either_is_lost(
    folders: Mapping[str, ModelFolder], start: Rung, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half here and half there it computes nothing: the replica has to be replaced, not to go on."""
    family = opened(folders["sd"], start)

    def none_left(*args: object) -> object:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(rungs, "_lay", none_left)
    with pytest.raises(DeviceLost, match="the denoiser could not be put back as it was"):
        descend(family, Rung.OFFLOAD)


@pytest.mark.parametrize("start", [Rung.RESIDENT, Rung.INT8, Rung.OFFLOAD])
@pytest.mark.parametrize("to", [Rung.OFFLOAD, Rung.SEQUENTIAL_OFFLOAD])
def test_a_way_down_that_runs_out_of_memory_leaves_the_family_as_it_was(
    folders: Mapping[str, ModelFolder], start: Rung, to: Rung, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first time; the second try gets there."""
    if start == to:
        return
    family = opened(folders["flux"], start)
    expected, exact = output(family), output(opened(folders["flux"]))
    real, tried = rungs._lay, []

    def scarce(*args: object) -> object:
        tried.append(args)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("none left")
        return real(*args)

    monkeypatch.setattr(rungs, "_lay", scarce)
    with pytest.raises(OutOfMemory):
        descend(family, to)
    assert family.rung == start
    assert torch.equal(output(family), expected)
    descend(family, to)
    check(family, exact)


def test_compiled_blocks_run_as_written_on_the_rungs_that_cut_them_up(
    folders: Mapping[str, ModelFolder], caplog: pytest.LogCaptureFixture
) -> None:
    compiled = DiffusionSettings(device="cpu", torch_threads=1, compile=True)
    plain = [rung for rung in LADDER if rungs.compiles(rung)]
    assert plain == [Rung.RESIDENT, Rung.VAE_SLICING, Rung.VAE_TILING, Rung.CPU]
    with caplog.at_level(logging.WARNING):
        family = opened(folders["sd"], Rung.INT8, compiled)
    assert not family.compiled
    assert "diffusion.compile: model sd is not compiled on the rung int8" in caplog.text


@pytest.mark.slow
def test_a_compiled_family_goes_down(folders: Mapping[str, ModelFolder]) -> None:
    expected = output(opened(folders["sd"]))
    family = opened(folders["sd"], settings=DiffusionSettings(device="cpu", torch_threads=1, compile=True))
    for rung, still in ((Rung.VAE_TILING, True), (Rung.ATTENTION_SLICING, False), (Rung.INT8, False)):
        descend(family, rung)
        assert family.compiled is still
        check(family, expected)
