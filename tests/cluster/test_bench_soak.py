"""The quick form of `tandem bench soak`, as it is typed: a server of its own, real pictures, nothing left over."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve.cli.app import app
from serve.errors import OperatorError


@pytest.mark.slow
@pytest.mark.cluster
def test_a_short_soak_leaves_nothing_behind(tmp_path: Path) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "memory.png"
    done = CliRunner().invoke(
        app, ["bench", "soak", "--quick", "--json", str(figures), "--plot", str(picture)], catch_exceptions=False
    )
    told = json.loads(figures.read_text())
    missed = [bar for bar in told["bars"] if not bar["met"] and not bar["doubt"]]
    assert done.exit_code == 0, missed
    assert missed == []
    assert told["fates"]["outcomes"] == {"done": 200}
    assert told["fates"]["jobs"] == told["fates"]["logged"] == 200
    assert {one["side"] for one in told["judged"]} == {64, 128}
    assert max(look["result_files"] for look in told["looks"]) > 0
    assert (told["end"]["result_files"], told["end"]["records"], told["end"]["keys"]) == (0, 0, [])
    roles = {use["role"] for look in told["looks"] for use in look["processes"].values()}
    assert roles >= {"diffusion", "encoder", "ingress", "proxy", "job redis", "cache redis", "tandem", "gcs", "raylet"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "not met" not in done.stdout


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--images", "3"], "--images: 3 is less than --users 16"),
        (["--quick", "--plot", "/nowhere/memory.png"], "--plot /nowhere/memory.png: No such file"),
        (["--quick", "--json", "/nowhere/x.json"], "--json /nowhere/x.json: No such file"),
    ],
)
def test_what_cannot_be_done_is_one_line(options: list[str], reason: str) -> None:
    with pytest.raises(OperatorError, match=reason):
        CliRunner().invoke(app, ["bench", "soak", *options], catch_exceptions=False)
