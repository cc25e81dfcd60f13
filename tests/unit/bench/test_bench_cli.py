"""The command, as it is typed. Cache hits need no encoder, so that they are what it measures here."""

import asyncio
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from serve.cli.bench import bench, check_writable, own_server
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
        (
            ["--only", "service", "--encoders", "openclip-bigg"],
            "--encoders: a server is measured with clip-l, openclip-h",
        ),
        (["--only", "hits,"], "--only: nothing is not one of throughput, pool"),
        (["--only", "hits", "--seconds", "0.2", "--json", "/nowhere/x.json"], "--json /nowhere/x.json: No such file"),
    ],
)
def test_what_cannot_be_done_is_one_line(options: list[str], reason: str) -> None:
    with pytest.raises(OperatorError, match=reason):
        CliRunner().invoke(app, ["bench", "encode", "--device", "cpu", *options], catch_exceptions=False)


def test_looking_whether_a_file_can_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text("of last week")
    check_writable(tmp_path / "figures.json")
    check_writable(tmp_path / "new.json")
    assert (tmp_path / "figures.json").read_text() == "of last week"
    assert not (tmp_path / "new.json").exists()


def test_the_server_of_a_bench_does_not_hear_the_operators_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server refuses an unknown setting, the environment's first: this one finds only that of the bench's file."""
    monkeypatch.setenv("TANDEM_NO_SUCH", "1")
    monkeypatch.setenv("TANDEM_CACHE__REDIS_URL", "redis://127.0.0.1:1/0")

    async def main() -> None:
        async with own_server(tmp_path / "model", {"unheard": {"of": 1}}):
            raise AssertionError("it has started")

    with pytest.raises(OperatorError, match="the server ended: unheard"):
        asyncio.run(main())
