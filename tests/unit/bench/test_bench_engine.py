"""The engine's bench on a small random model: every section measures, and the report says what was measured."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from support.image_models import sd3_model, sd_model

from serve.bench.engine import SECTIONS, Plan, Report, measure
from serve.bench.engine_load import ShortBehindLong
from serve.bench.engine_report import as_json, bars, headline, tables
from serve.bench.mixed import mixed_orders
from serve.bench.stats import Spread
from serve.models import check_folder
from serve.settings.pools import DiffusionSettings


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = sd_model(tmp_path_factory.mktemp("bench") / "small")
    plan = Plan(
        source=str(folder),
        diffusion=DiffusionSettings(device="cpu", torch_threads=1, profile_s=0.5),
        sections=frozenset(SECTIONS),
        orders=36,
        rounds=1,
        seconds=2.0,
        seed=3,
    )
    return measure(plan, lambda _: None)


@pytest.mark.slow
def test_every_section_has_its_figures(report: Report) -> None:
    assert report.model == "small"
    assert [time.images for time in report.steps[0].times][:2] == [1, 2]
    assert all(time.seconds > 0 for one in report.steps for time in one.times)
    assert all(one.decode_s > 0 and one.gain >= 1 for one in report.steps)
    assert report.saturated is not None
    assert report.saturated.ratio.median > 0
    assert report.open_loop is not None
    for side in (report.open_loop.stock, report.open_loop.engine):
        assert not side.failed
        assert side.seconds is not None
        assert side.seconds.count % 36 == 0
        assert side.seconds.count >= 2.0 * side.rate
    assert {one.threshold for one in report.savings} == {0.05, 0.1, 0.2, None}
    assert all(0 <= one.saved < 1 and one.error >= 0 for one in report.savings)
    assert report.short is not None
    assert report.short.short_s < report.short.first_long_s


@pytest.mark.slow
def test_the_report_is_tables_and_json(report: Report) -> None:
    told = json.loads(json.dumps(as_json(report)))
    assert told["caps"][0]["images"] >= 1
    assert {bar["what"] for bar in told["bars"]} == {bar.what for bar in bars(report)}
    console = Console(width=120, record=True, file=io.StringIO())
    for table in tables(report):
        console.print(table)
    text = console.export_text()
    for title in (
        "One step of guided images",
        "Mixed work, 24 users",
        "The same arrivals",
        "4 steps",
        "Forward passes",
        "Bars",
    ):
        assert title in text
    assert "model small (sd)" in headline(report)


@pytest.mark.slow
def test_bars_are_met_missed_or_in_doubt(report: Report) -> None:
    assert report.saturated is not None

    def verdicts(ratio: float, others: float, last_s: float) -> list[tuple[bool, bool]]:
        spread = Spread(median=ratio, low=ratio, high=ratio, count=1)
        saturated = replace(report.saturated, ratio=spread)  # type: ignore[type-var]
        short = ShortBehindLong(short_s=1.0, own_s=0.5, first_long_s=2.0, last_s=last_s, alone_s=9.0)
        told = replace(report, saturated=saturated, open_loop=None, short=short, other_work=others)
        return [(bar.met, bool(bar.doubt)) for bar in bars(told)]

    assert verdicts(1.3, 0.0, 9.5) == [(True, False), (True, False), (True, False)]
    assert verdicts(1.29, 0.0, 9.6) == [(False, False), (True, False), (False, False)]
    assert verdicts(1.29, 0.2, 9.6) == [(False, True), (True, False), (False, True)]
    assert verdicts(1.5, 0.2, 9.5) == [(True, False), (True, False), (True, False)]


def test_mixed_orders_are_mixed_and_the_seed_fixes_them(tmp_path: Path) -> None:
    model = check_folder(sd_model(tmp_path / "sd"), "sd")
    orders = mixed_orders(model, ["a", "b"], 60, 1)
    assert orders == mixed_orders(model, ["a", "b"], 60, 1) != mixed_orders(model, ["a", "b"], 60, 2)
    for field in ("num_inference_steps", "scheduler", "width", "guidance_scale", "prompt"):
        assert len({getattr(order, field) for order in orders}) > 1, field
    assert {order.guided for order in orders} == {True, False}
    assert len({order.seed for order in orders}) == len(orders)
    flow = mixed_orders(check_folder(sd3_model(tmp_path / "sd3"), "sd3"), ["a"], 5, 1)
    assert {order.scheduler for order in flow} == {"flow_euler"}


@pytest.mark.slow
def test_the_command_pins_itself_and_refuses_in_one_line(tmp_path: Path) -> None:
    """In a process of its own: it gives up cores for good."""
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "serve.cli", "bench", "engine"]
    options = ["--model", str(sd_model(tmp_path / "small")), "--only", "steps", "--quick", "--seconds", "1"]
    done = subprocess.run(
        [*command, *options, "--threads", "1", "--json", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "One step of guided images together" in done.stdout
    assert json.loads(file.read_text())["machine"]["cores"] == 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    done = subprocess.run([*command, "--threads", str(cores + 1)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.strip().endswith(f"--threads: this process may use {cores} cores")
