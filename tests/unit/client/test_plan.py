"""`tandem plan`: what it answers for the published models, what it prints, which cards it finds, what it refuses."""

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from serve.cli.plan_rows import CONTEXT_BYTES, Asked, Card, Fit, grid
from serve.cli.plan_screen import show
from serve.cli.plan_wanted import wanted_cards, wanted_models
from serve.memory.classes import BUILT_IN, GpuClass
from serve.memory.planner import plan
from serve.memory.shapes import published
from serve.memory.sheets import SHEETS
from serve.models import SHIPPED
from serve.rungs import Rung

Tandem = Callable[..., int]
Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def told(tandem: Tandem, capsys: pytest.CaptureFixture[str]) -> Rows:
    """The rows of `tandem plan --json`."""

    def run(*arguments: object) -> list[dict[str, Any]]:
        assert tandem("plan", "--json", *arguments) == 0, capsys.readouterr().err
        rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
        return rows

    return run


def printed(width: int, encoding: str = "utf-8", *, detail: bool = False, models: str | None = None) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, highlight=False, markup=False)
    found = grid(wanted_models(models), wanted_cards(None, {}, from_nvidia_smi=False), Asked())
    show(found, detail=detail, console=console)
    file.flush()
    assert isinstance(file.buffer, io.BytesIO)
    return file.buffer.getvalue().decode(encoding)


def test_small_cards_serve_what_they_are_said_to_serve(told: Rows) -> None:
    rows = {(row["model"], row["gpu_class"]): row for row in told()}
    assert len(rows) == len(published()) * len(BUILT_IN)
    for small in (("sd15", "4gb"), ("sdxl", "11gb"), ("sd35-medium", "11gb")):
        assert rows[small]["rung"] == "resident"
        assert rows[small]["fits"]
        assert rows[small]["decode"] == "whole"
        assert rows[small]["peak_gb"] <= 0.9 * rows[small]["memory_gb"]
    for large in ("sd35-large", "flux-dev"):
        assert rows[large, "11gb"]["rung"] in ("int8", "int4", "offload")
        assert rows[large, "11gb"]["fits"]
        assert rows[large, "80gb"]["rung"] == "resident"
    (tiled,) = told("--models", "sdxl", "--classes", "11gb", "--size", "1536x1536")
    assert (tiled["rung"], tiled["decode"], tiled["fits"]) == ("resident", "tiled", True)
    assert tiled["phases"]["step_gb"] > rows["sdxl", "11gb"]["phases"]["step_gb"]


def test_a_4_gb_card_draws_sd15_faster_than_the_guide_says_by_a_sum_that_is_shown(
    told: Rows, tandem: Tandem, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = told("--models", "sd15", "--classes", "4gb", "--steps", 25)
    assert 0.5 < row["seconds"] < 45
    assert math.isclose(sum(term["seconds"] for term in row["arithmetic"]), row["seconds"], rel_tol=1e-3)
    (twice,) = told("--models", "sd15", "--classes", "4gb", "--steps", 50)
    assert 1.5 * row["seconds"] < twice["seconds"] < 2 * row["seconds"]
    assert tandem("plan", "--models", "sd15", "--classes", "4gb") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for term in row["arithmetic"]:
        assert term["how"] in shown


def test_phases_make_the_peak_and_shares_hold_it(told: Rows) -> None:
    for row in told():
        phases = row["phases"]
        vae = max(phases["decode_gb"], phases["encode_gb"])
        on_top = phases["step_gb"] + vae if row["beside"] else max(phases["step_gb"], vae)
        assert row["peak_gb"] == pytest.approx(phases["weights_gb"] + on_top, abs=0.003)
        assert row["fits"] == (row["replicas"] >= 1) == (row["peak_gb"] <= row["usable_gb"] and row["rung"] != "cpu")
        if not row["fits"]:
            continue
        gpu = BUILT_IN[row["gpu_class"]]
        assert row["replicas"] * row["share"] <= 1
        if row["replicas"] > 1:
            rest = gpu.memory_gb - row["replicas"] * row["peak_gb"]
            assert rest >= row["replicas"] * CONTEXT_BYTES / 1e9 - 0.01
        alone = plan(published()[row["model"]], gpu.memory_bytes * row["share"], gpu.dtypes)
        assert alone.rung == row["rung"], "a replica that has its share plans as it does on the whole card"
        wide, high = row["max_size"]
        assert wide * high <= row["max_pixels"]
        assert row["images"] >= 1


@pytest.mark.parametrize("width", [80, 60, 200])
def test_the_grid_is_read_without_colour_in_narrow_consoles(width: int) -> None:
    text = printed(width)
    assert max(map(cell_len, text.splitlines())) <= width
    for name in (*published(), *BUILT_IN):
        assert name in text
    assert "resident" in text
    assert "! int4" in text
    assert "✓" in text
    assert "…" not in text, "nothing is cut off"


def test_one_glance_is_one_screen() -> None:
    lines = printed(80).splitlines()
    headings = [line for line in lines if "4gb" in line and "80gb" in line]
    assert len(headings) == 1, "all built-in classes stand side by side"
    assert len(lines) <= 2 * len(published()) + 8


def test_a_console_of_ascii_alone_gets_ascii() -> None:
    text = printed(80, "ascii", models="sdxl,flux-dev")
    assert "+ resident" in text
    assert "?" not in text


def test_long_names_are_shown_whole() -> None:
    name, card = "stable-diffusion-xl-base-1.0", "a card with a very long name"
    (model,) = wanted_models("sdxl")
    named = replace(model, shape=replace(model.shape, name=name))
    console = Console(file=io.StringIO(), width=80, record=True, highlight=False, markup=False)
    show(grid([named], [Card(gpu=replace(BUILT_IN["8gb"], name=card))] * 5, Asked()), detail=False, console=console)
    lines = console.export_text().splitlines()
    for column, text in ((slice(0, 15), name), (slice(16, 28), card)):
        assert text.replace(" ", "") in "".join(line[column].strip().replace(" ", "") for line in lines)


def test_every_cell_can_be_told_in_full() -> None:
    text = printed(100, detail=True, models="sd15,flux-dev")
    assert text.count("predicted:") == sum(cell.fit is not Fit.NONE for row in _all("sd15,flux-dev") for cell in row)
    assert "no room   for resident (26." in text
    assert text.count("memory    weights ") == 2 * len(BUILT_IN)
    assert text.count("like a GeForce RTX 2080 Ti") == 2


def _all(models: str) -> Any:
    return grid(wanted_models(models), wanted_cards(None, {}, from_nvidia_smi=False), Asked())


def test_a_card_that_is_not_known_has_no_time_and_one_that_is_too_small_holds_nothing() -> None:
    tiny = Card(gpu=GpuClass(name="tiny", memory_gb=0.05, dtypes=("float16",)))
    plain = Card(gpu=GpuClass(name="plain", memory_gb=12, dtypes=("float16",)))
    ((none, some),) = grid(wanted_models("sdxl"), [tiny, plain], Asked())
    assert none.fit is Fit.NONE
    assert (none.share, none.replicas, none.speed) == (0, 0, None)
    assert some.fit is Fit.WHOLE
    assert some.speed is None
    console = Console(file=io.StringIO(), width=80, record=True, highlight=False, markup=False)
    show([[none, some]], detail=True, console=console)
    text = console.export_text()
    assert "not known" in text
    assert "– no" in text
    assert "does not fit" in text


def test_settings_have_classes_and_rungs(told: Rows, tmp_path: Path) -> None:
    file = tmp_path / "tandem.yaml"
    file.write_text("gpu_classes: {turing: {memory_gb: 11, dtypes: [float16]}, 4gb: {memory_gb: 6}}\n")
    own, built_in = told("--models", "sd35-large", "--classes", "turing,8gb", "--config", file)
    assert (own["gpu_class"], own["memory_gb"], own["dtype"], own["seconds"]) == ("turing", 11, "float16", None)
    assert built_in["seconds"] > 0
    (larger,) = told("--models", "sd15", "--classes", "4gb", "--config", file)
    assert (larger["memory_gb"], larger["seconds"]) == (6, None), "another card than the built-in one of that name"
    (none,) = told("--models", "flux-dev", "--classes", "4gb", "--set", "diffusion.worst_rung=attention_slicing")
    assert (none["fits"], none["rung"], none["replicas"]) == (False, "attention_slicing", 0)
    (begun,) = told("--models", "sd15", "--classes", "80gb", "--set", "diffusion.rung=int8")
    assert begun["rung"] == Rung.INT8
    (half,) = told("--models", "sd15", "--classes", "80gb")
    (whole,) = told("--models", "sd15", "--classes", "80gb", "--set", "diffusion.dtype=float32")
    assert whole["dtype"] == "float32"
    assert whole["phases"]["weights_gb"] == pytest.approx(2 * half["phases"]["weights_gb"], abs=0.002)


def test_a_folder_is_planned_by_its_headers(told: Rows, tmp_path: Path) -> None:
    (row,) = told("--models", SHIPPED, "--classes", "4gb", "--set", f"data_dir={tmp_path}")
    assert (row["model"], row["width"], row["height"], row["rung"]) == ("weights", 128, 128, "resident")
    assert row["phases"]["weights_gb"] < 0.05
    assert row["replicas"] > 1
    assert not any(tmp_path.iterdir())
    fields = {"model.source": SHIPPED, "model.name": "sdxl", "model.num_inference_steps": 40, "data_dir": tmp_path}
    own = [word for field in fields.items() for word in ("--set", "=".join(map(str, field)))]
    (named,) = told("--models", "sdxl", "--classes", "4gb", *own)
    assert (named["model"], named["width"]) == ("sdxl", 128), "the settings' name goes before the published one"
    assert named["seconds"] > row["seconds"], "more steps"


def test_it_needs_no_torch() -> None:
    probe = (
        "import sys; sys.argv = ['tandem', 'plan', '--json']\n"
        "from serve.cli.app import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    names = ('torch', 'ray', 'transformers', 'fastapi')\n"
        "    print([name for name in names if name in sys.modules], file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stderr.strip() == "[]"
    assert len(json.loads(run.stdout)) == len(published()) * len(BUILT_IN)


def test_steps_that_nobody_draws_are_a_mistake(tandem: Tandem, capsys: pytest.CaptureFixture[str]) -> None:
    assert tandem("plan", "--models", "sd15", "--steps", "1" + "0" * 400) == 2
    assert "'--steps'" in capsys.readouterr().err


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts an `nvidia-smi` on PATH that is a script of the shell, and nothing else."""

    def write(script: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        tool = folder / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")

    return write


CARDS = r"""
[ "$1 $2" = "--query-gpu=name,memory.total,compute_cap --format=csv,noheader,nounits" ] || exit 6
echo "NVIDIA GeForce RTX 2080 Ti, 11264, 7.5"
echo "NVIDIA GeForce RTX 9999, 12288, 8.6"
echo "NVIDIA GeForce RTX 2080 Ti, 11264, 7.5"
echo "NVIDIA GeForce RTX 9999, 8192, 8.6"
"""


def test_the_cards_of_this_machine(
    driver: Callable[[str], None], told: Rows, tandem: Tandem, capsys: pytest.CaptureFixture[str]
) -> None:
    driver(CARDS)
    old, new, small = told("--from-nvidia-smi", "--models", "sdxl")
    assert (old["gpu_class"], old["cards"], old["rung"], old["dtype"]) == (
        "GeForce RTX 2080 Ti",
        2,
        "resident",
        "float16",
    )
    assert old["memory_gb"] == pytest.approx(11.811, abs=0.001)
    assert old["seconds"] > 1, "its data sheet is known"
    assert (new["cards"], new["seconds"]) == (1, None)
    assert small["gpu_class"] == new["gpu_class"], "cards of one name and unlike memory are two kinds"
    assert small["memory_gb"] < new["memory_gb"]
    (modern,) = {row["dtype"] for row in told("--from-nvidia-smi", "--models", "flux-dev")[1:]}
    assert modern == "bfloat16"
    assert tandem("plan", "--from-nvidia-smi") == 0
    text = capsys.readouterr().out
    assert "11.8 GB x 2" in text
    assert "8.59 GB x 1" in text


def test_sheets_are_of_cards_as_they_are_built() -> None:
    for name, (half, single, memory, link) in SHEETS.items():
        assert not name.startswith("NVIDIA")
        assert single < half, "tensor cores take halves faster"
        assert 10 < half < 1000
        assert link < memory < 4000
    for each in BUILT_IN.values():
        twins = [sheet for name, sheet in SHEETS.items() if name.removesuffix(" GPU") == each.like]
        for half, single, memory, link in twins:
            assert each.tflops["float16"] == half
            assert each.tflops["float32"] == single
            assert (each.bandwidth_gb_s, each.pcie_gb_s) == (memory, link)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'NVIDIA-SMI has failed because it could not talk to the driver'; exit 9", "NVIDIA-SMI has failed"),
        ("exit 9", "nvidia-smi ended with 9"),
        ("exit 0", "nvidia-smi sees no card"),
        ("echo 'NVIDIA GB10, [N/A], 12.1'", "'NVIDIA GB10, [N/A], 12.1', not name, memory.total, compute_cap"),
        ("echo nonsense", "'nonsense', not name"),
        ("echo 'NVIDIA card, -5, 8.6'", "'NVIDIA card, -5, 8.6', not name"),
        ("echo 'NVIDIA card, 0, 8.6'", "'NVIDIA card, 0, 8.6', not name"),
        (f"echo 'NVIDIA card, 1{'0' * 400}, 8.6'", "...', not name"),
        ("head -c 200000 /dev/zero | tr '\\0' x; echo ', 4096, 8.6'", "says what is no table: field larger than"),
    ],
)
def test_a_driver_that_fails_is_one_line(
    script: str, said: str, driver: Callable[[str], None], tandem: Tandem, capsys: pytest.CaptureFixture[str]
) -> None:
    driver(script)
    refused(tandem, capsys, said, "--from-nvidia-smi")


def refused(tandem: Tandem, capsys: pytest.CaptureFixture[str], said: str, *arguments: object) -> None:
    assert tandem("plan", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tandem: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_mistakes_are_one_line_that_names_them(
    tandem: Tandem, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.ckpt").write_bytes(b"")
    for said, *arguments in (
        ("--models: sd9 is neither a folder nor a file here, and none of sd15, sd21, sdxl", "--models", "sd9"),
        ("--models: nothing is named", "--models", " , "),
        ("no model_index.json", "--models", tmp_path / "empty"),
        ("pickled", "--models", tmp_path / "x.ckpt"),
        ("--classes: there is no class 5gb; there are 4gb, 8gb, 11gb, 24gb, 80gb", "--classes", "4gb,5gb"),
        ("--classes: nothing is named", "--classes", ""),
        ("--size: 1024 is no size like 1024x768", "--size", "1024"),
        ("--size: 1000 is not a multiple of 16, as flux-dev needs", "--models", "flux-dev", "--size", "1000x1024"),
        ("--size: 0 is not a multiple of 8", "--models", "sd15", "--size", "0x512"),
        ("--size: 4096 pixels a side are the most", "--models", "sd15", "--size", "4104x512"),
        ("name one or the other", "--classes", "4gb", "--from-nvidia-smi"),
        ("below worst_rung", "--set", "diffusion.rung=cpu"),
        ("--models: ~nosuchuser/x: there is no such user", "--models", "~nosuchuser/x"),
        (f"--models: {'a' * 80}...: File name too long", "--models", "a" * 5000),
        ("gpu_classes.x.memory_gb: Input should be a finite number", "--set", "gpu_classes.x.memory_gb=inf"),
        ("gpu_classes.x.memory_gb: Input should be less than", "--set", "gpu_classes.x.memory_gb=1e308"),
        ("model.num_inference_steps: Input should be less", "--set", f"model.num_inference_steps=1{'0' * 400}"),
    ):
        refused(tandem, capsys, said, *arguments)
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(tandem, capsys, "--from-nvidia-smi: no nvidia-smi is here; name cards with --classes", "--from-nvidia-smi")
