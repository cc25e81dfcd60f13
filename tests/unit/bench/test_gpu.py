"""`tandem bench gpu` on a CPU, with models so small that a section takes a second: that it measures what it says, and
what it tells of that. Its times are of no use here; what it counts is."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from support.image_models import BUILDERS
from typer.testing import CliRunner

from serve.bench.gpu import SECTIONS, Plan, Report, jobs, measure
from serve.bench.gpu_memory import empty_card, measure_held
from serve.bench.gpu_report import as_json, headline, markdown, sheets, tables
from serve.bench.machine import this_machine
from serve.bench.random_models import random_family, random_work
from serve.bench.shapes import SHAPES, T5_XXL, EncoderShape
from serve.bench.windows import Budget
from serve.cli.bench import bench
from serve.cli.bench_gpu import gpu
from serve.devices import Card
from serve.diffusion.runner import Runner
from serve.errors import DeviceLost, OperatorError
from serve.memory.planner import plan
from serve.memory.shapes import shape_of
from serve.memory.terms import ModelShape
from serve.models.folder import check_folder
from serve.rungs import Rung

CPU = torch.device("cpu")
CARD = Card("no card at all", 24_000_000_000, ("float32",))
BUDGET = Budget(windows=1, window_s=0.01, longest_s=0.05)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelShape]:
    """Of a small model of the family."""

    def made(family: str) -> ModelShape:
        return shape_of(check_folder(BUILDERS[family](tmp_path_factory.mktemp(family)), family))

    return made


def tiny(encoder: EncoderShape) -> EncoderShape:
    projection = None if encoder.projection is None else 16
    sizes = {"width": 32, "layers": 1, "heads": 2, "head_width": 16, "feed_forward": 32, "projection": projection}
    return dataclasses.replace(encoder, **sizes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def report(shape: Callable[[str], ModelShape]) -> Report:
    """Of every section but that of the compiler, which takes a minute here."""
    return measure(
        Plan(
            device=CPU,
            card=CARD,
            shapes={"sd15": shape("sd")},
            sections=frozenset(SECTIONS) - {"compile"},
            encoders={each.name: tiny(each) for each in (SHAPES["openclip-bigg"], T5_XXL)},
            lanes=(1, 2),
            batch=2,
            images=3,
            steps=2,
            encoder_budget=BUDGET,
            look_s=0.01,
            cases=(("sd15", "4gb", 64), ("sd15", "80gb", 64), ("sdxl", "11gb", 64)),
            ladders=(("sd15", "4gb", 64),),
            rungs=(Rung.VAE_SLICING, Rung.INT8, Rung.SEQUENTIAL_OFFLOAD),
        ),
        lambda what: None,
    )


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_a_model_that_is_made_has_the_weights_of_its_shape_and_draws(
    shape: Callable[[str], ModelShape], family: str
) -> None:
    made = shape(family)
    drawn = random_family(made, CPU, torch.float32, Rung.RESIDENT)
    assert sum(each.numel() for each in drawn.denoiser.state_dict().values()) == made.parameters
    assert drawn.vae.nbytes == 4 * made.vae_parameters
    runner = Runner(drawn)
    work = random_work(runner, made, (64, 64), 0, 2)
    assert len(work.schedule.texts) == made.lanes
    (row,) = runner.rows(work)
    runner.begin(row, work, None)
    assert runner.step([row]) == {}
    assert runner.step([row]) == {}
    picture = runner.decode(runner.release(row))
    assert getattr(picture, "size", None) == (64, 64)


def test_the_weights_that_are_measured_are_those_that_were_predicted(report: Report) -> None:
    """Nothing of them is an estimate, but what offloading leaves on a card, which a CPU does not tell apart."""
    held = {one.rung: {phase.phase: phase for phase in one.phases} for one in report.rungs}
    assert list(held) == [Rung.VAE_SLICING, Rung.INT8, Rung.SEQUENTIAL_OFFLOAD]
    assert held[Rung.VAE_SLICING]["weights"].error == 0
    assert abs(held[Rung.INT8]["weights"].error) < 0.05
    assert held[Rung.INT8]["weights"].measured < held[Rung.VAE_SLICING]["weights"].measured
    assert all(one.fits for one in report.rungs)


def test_every_phase_of_a_case_is_measured_in_its_plan(report: Report) -> None:
    (one,) = report.memory
    assert (one.model, one.gpu_class, one.rung, one.cap) == ("sd", "4gb", Rung.RESIDENT, 3_600_000_000)
    assert [phase.phase for phase in one.phases] == ["weights", "step", "decode", "encode"]
    assert all(phase.measured > 0 for phase in one.phases)
    assert one.fits


def test_a_class_that_is_larger_than_the_card_is_left_out_and_said_so(report: Report) -> None:
    assert report.left_out == ("sd15 at 64 x 64 in 80gb: the card has 24.0 GB",)


def test_tiles_are_what_the_plan_says(shape: Callable[[str], ModelShape]) -> None:
    """A decoding in tiles takes less than one of the whole image."""
    made = shape("sd")
    whole = plan(made, 4e9, ("float32",), width=192, height=192)
    decoded = {
        tile: measure_held(made, dataclasses.replace(whole, tile=tile), "4gb", CPU).phases[2].measured
        for tile in (64, 1024)
    }
    assert decoded[64] < decoded[1024] / 4


def test_what_fails_is_told_and_the_next_one_is_measured(shape: Callable[[str], ModelShape]) -> None:
    """A rotary embedding of no such width: the model can't step."""
    good = shape("flux")
    broken = dataclasses.replace(good, denoiser={**good.denoiser, "axes_dims_rope": [2, 2, 2]})
    told: list[str] = []
    made = Plan(
        device=CPU,
        card=CARD,
        shapes={"broken": broken, "good": good},
        sections=frozenset({"steps"}),
        encoders={},
        lanes=(1,),
    )
    report = measure(made, told.append)
    assert told == ["steps of flux", "steps of flux"]
    assert report.left_out == ("steps of flux: the denoiser failed on this request",)
    assert [one.lanes for one in report.steps] == [1]


class Stumbling:
    """A measurement that raises what it is given, one thing after the other, and then gives a figure."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def __call__(self, *_: object) -> list[object]:
        if self.errors:
            raise self.errors.pop(0)
        return [object()]


def stumbles(monkeypatch: pytest.MonkeyPatch, made: Plan, *errors: Exception) -> Report:
    monkeypatch.setattr("serve.bench.gpu._held", Stumbling(*errors))
    return measure(made, lambda what: None)


def test_whatever_goes_wrong_costs_one_figure_and_a_lost_card_those_that_are_left(
    monkeypatch: pytest.MonkeyPatch, shape: Callable[[str], ModelShape]
) -> None:
    cases = tuple(("sd15", "4gb", side) for side in (64, 128, 192))
    made = Plan(
        device=CPU, card=CARD, shapes={"sd15": shape("sd")}, sections=frozenset({"memory"}), encoders={}, cases=cases
    )
    raw = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    report = stumbles(monkeypatch, made, raw, ZeroDivisionError("division\nby zero"))
    assert report.left_out == (
        "sd15 at 64 x 64 in 4gb: memory ran out",
        "sd15 at 128 x 128 in 4gb: ZeroDivisionError: division",
    )
    assert (len(report.memory), report.lost) == (1, False)
    for error in (DeviceLost("the denoiser: the device failed"), torch.AcceleratorError("CUDA error: unspecified")):
        report = stumbles(monkeypatch, made, error)
        assert (len(report.left_out), report.memory, report.lost) == (1, (), True)
    report = stumbles(monkeypatch, made, torch.AcceleratorError("CUDA error: out of memory"))
    assert (len(report.memory), report.lost) == (2, False)


def test_a_picture_that_has_no_memory_to_be_encoded_is_that_cases_trouble(
    monkeypatch: pytest.MonkeyPatch, shape: Callable[[str], ModelShape]
) -> None:
    made = shape("sd")
    no_room = Stumbling(*[torch.OutOfMemoryError("CUDA out of memory")] * 9)
    monkeypatch.setattr("serve.diffusion.vae.Vae.encode", no_room)
    held = measure_held(made, plan(made, 4e9, ("float32",), width=64, height=64), "4gb", CPU)
    assert held.trouble == "encode: the VAE: the device ran out of memory"
    assert [phase.phase for phase in held.phases] == ["weights", "step", "decode"]


def test_figures_are_written_though_the_card_was_lost_and_the_exit_code_says_so(
    monkeypatch: pytest.MonkeyPatch, shape: Callable[[str], ModelShape], tmp_path: Path
) -> None:
    """So it does where none of the memory that was asked for could be measured."""
    made = Plan(
        device=CPU,
        card=CARD,
        shapes={"sd15": shape("sd")},
        sections=frozenset({"memory"}),
        encoders={},
        cases=(("sd15", "80gb", 64), ("sd15", "4gb", 64)),
    )
    assert not measure(dataclasses.replace(made, cases=made.cases[:1]), print).holds(made.sections)
    assert Report(machine=this_machine(), card=CARD).holds(frozenset({"steps"}))
    monkeypatch.setattr("serve.cli.bench_gpu._plan", lambda *_: made)
    monkeypatch.setattr("serve.bench.gpu.measure_held", Stumbling(DeviceLost("the denoiser: the device failed")))
    app = typer.Typer()
    app.command()(gpu)
    app.command("other")(lambda: None)
    files = tmp_path / "gpu.json", tmp_path / "gpu.md"
    done = CliRunner().invoke(app, ["gpu", "--json", str(files[0]), "--markdown", str(files[1])])
    assert done.exit_code == 1, done.output
    told = json.loads(files[0].read_text())
    assert told["lost"]
    assert told["left_out"][0] == "sd15 at 64 x 64 in 80gb: the card has 24.0 GB"
    assert "the device failed" in files[1].read_text()


def test_what_cublas_keeps_goes_before_the_card_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card tests/gpu holds it."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("cache"))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: done.append("workspaces"), raising=False)
    empty_card()
    assert done == ["workspaces", "cache"]


def test_sections_are_made_in_their_order(shape: Callable[[str], ModelShape]) -> None:
    made = Plan(
        device=CPU,
        card=CARD,
        shapes={"sd15": shape("sd")},
        sections=frozenset({"encoders", "compile", "memory"}),
        encoders={"t5-xxl": T5_XXL},
    )
    found = [(job.section, job.what) for job in jobs(made)]
    assert found == [
        ("memory", "sd15 at 512 x 512 in 4gb"),
        ("compile", "steps of sd, compiled"),
        ("encoders", "rows of t5-xxl"),
    ]


def test_the_report_as_tables_markdown_and_json(report: Report) -> None:
    titles = [sheet.title for sheet in sheets(report)]
    assert len(titles) == 6
    assert titles[-1] == "Not measured"
    written = markdown(report)
    console = Console(file=io.StringIO(), width=200)
    for table in tables(report):
        console.print(table)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for told in ("sequential_offload", "openclip-bigg", "t5-xxl", "64 x 64"):
        assert told in written
        assert told in printed
    assert "memory is predicted within" in headline(report)
    figures = json.loads(json.dumps(as_json(report), default=str))
    assert set(SECTIONS) < set(figures)
    weights, kind = figures["memory"][0]["phases"][0], report.memory[0].phases[0]
    assert weights == {"phase": "weights", "predicted": kind.predicted, "measured": kind.measured, "error": 0.0}
    assert figures["images"][0]["images_per_s"] == pytest.approx(3 / report.images[0].seconds)
    assert figures["worst_error"] >= 0


def test_what_can_not_be_measured_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    app = typer.Typer()
    app.add_typer(bench, name="bench")
    bench.command()(gpu)
    for options, reason in (
        ([], "bench gpu: there is no CUDA device here; nothing was measured"),
        (["--only", "memory,speed"], "--only: speed is not one of memory, rungs, steps"),
        (["--models", "sd9"], "--models: sd9 is not one of sd15, sd21"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json: No such file"),
    ):
        with pytest.raises(OperatorError, match=reason):
            CliRunner().invoke(app, ["bench", "gpu", *options], catch_exceptions=False)
