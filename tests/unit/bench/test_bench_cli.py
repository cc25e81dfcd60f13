"""The command, as it is typed. Cache hits need no encoder, so that they are what it measures here."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from serve.cli.bench import bench
from serve.errors import OperatorError

app = typer.Typer()
app.add_typer(bench, name="bench")


def test_a_run_prints_its_tables_and_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = ["bench", "encode", "--only", "hits", "--seconds", "0.2", "--device", "cpu", "--json", str(file)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert "A cache hit, ms" in done.stdout
    assert "Prompts a second" not in done.stdout
    told = json.loads(file.read_text())
    assert {hit["tier"] for hit in told["hits"]} == {"memory", "redis"}
    assert all(hit["seconds"]["count"] == 10 for hit in told["hits"])
    assert told["machine"]["threads"] >= 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--encoders", "clip-l,clip-xxl"], "--encoders: clip-xxl is not one of clip-l, openclip-h"),
        (["--only", "hits,"], "--only: nothing is not one of throughput, pool"),
        (["--only", "hits", "--seconds", "0.2", "--json", "/nowhere/x.json"], "--json /nowhere/x.json: No such file"),
    ],
)
def test_what_cannot_be_done_is_one_line(options: list[str], reason: str) -> None:
    with pytest.raises(OperatorError, match=reason):
        CliRunner().invoke(app, ["bench", "encode", "--device", "cpu", *options], catch_exceptions=False)
