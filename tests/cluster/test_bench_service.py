"""`tandem bench service`, as it is typed. Figures are not judged here, only that there are some."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from serve.cli.bench_service import service

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.mark.timeout(900)
def test_the_bare_engine_draws_what_the_server_draws_and_without_it(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    app = typer.Typer()
    app.command()(service)
    done = CliRunner().invoke(app, ["--quick", "--only", "saturated", "--json", str(file)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())["saturated"]
    assert 0.3 < found["ratio"]["median"] < 1.5
    assert found["ratio"]["count"] == found["tandem"]["count"] == found["bare"]["count"] == 2
    assert found["roles"]["diffusion"] > found["roles"]["ingress"] > 0
    assert 0 < sum(found["idle"].values()) < 1
    assert not found["failed"]


@pytest.mark.timeout(600)
def test_round_trips_of_a_job_are_counted_for_every_kind_of_client(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    app = typer.Typer()
    app.command()(service)
    done = CliRunner().invoke(app, ["--quick", "--only", "redis", "--json", str(file)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "Redis, round trips and commands of one job" in done.stdout
    assert "Mixed work" not in done.stdout
    costs = json.loads(file.read_text())["redis"]["costs"]
    assert [(one["dialect"], one["steps"]) for one in costs] == [
        (dialect, steps) for dialect in ("wait", "events", "poll") for steps in (4, 50)
    ]
    for one in costs:
        assert one["failed"] == 0
        assert one["trips"]["jobs"] > 3  # logged, claimed, settled
        assert one["calls"]["jobs"]["evalsha"] > 3
