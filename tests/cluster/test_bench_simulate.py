"""The quick form of `tandem bench simulate`, as it is typed: a server of its own, real pictures, the same simulated."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve.cli.app import app
from serve.errors import OperatorError
from serve.simulate.fleet import load
from serve.simulate.traffic import read


@pytest.mark.slow
@pytest.mark.cluster
def test_a_short_calibration_measures_simulates_and_keeps_what_it_simulated(tmp_path: Path) -> None:
    figures, kept = tmp_path / "figures.json", tmp_path / "kept"
    options = ["--quick", "--loads", "0.3", "--json", str(figures), "--out", str(kept)]
    done = CliRunner().invoke(app, ["bench", "simulate", *options], catch_exceptions=False)
    told = json.loads(figures.read_text())
    assert done.exit_code == (0 if told["within"] else 1)
    (one,) = told["loads"]
    assert one["orders"] == one["done"] > 0
    assert 0 < one["measured_s"]["50"] <= one["measured_s"]["95"]
    assert 0 < one["simulated_s"]["50"] <= one["simulated_s"]["95"]
    fleet = load(kept / "fleet-0.3.yaml")
    assert len(read(kept / "load-0.3.jsonl", [fleet.shape("here")]).orders) == one["orders"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--loads", "often"], "--loads often: write shares of the capacity"),
        (["--loads", "0.5,2"], "--loads 0.5,2: write shares of the capacity"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json: No such file"),
        (["--out", "/dev/null/kept"], "--out: /dev/null/kept: Not a directory"),
    ],
)
def test_what_the_options_refuse(options: list[str], reason: str) -> None:
    with pytest.raises(OperatorError, match=reason):
        CliRunner().invoke(app, ["bench", "simulate", *options], catch_exceptions=False)
