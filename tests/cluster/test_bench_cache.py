"""The quick form of `tandem bench cache`, as it is typed: whole servers, counted by their own metrics."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve.cli.app import app
from serve.errors import OperatorError


def measured(tmp_path: Path, *options: str) -> tuple[int, dict[str, object]]:
    figures = tmp_path / "figures.json"
    command = ["bench", "cache", "--quick", "--json", str(figures), *options]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    told: dict[str, object] = json.loads(figures.read_text())
    return done.exit_code, told


@pytest.mark.slow
@pytest.mark.cluster
def test_a_job_costs_the_forwards_that_no_cache_could_save(tmp_path: Path) -> None:
    code, told = measured(tmp_path, "--only", "traffic", "--orders", "40")
    assert code == 0
    assert told["paired"] is None
    traffic = {one["name"]: one for one in told["traffic"]}  # type: ignore[attr-defined]
    assert list(traffic) == ["Zipf 0.6", "Zipf 0.8", "Zipf 1", "all unique"]
    for one in traffic.values():
        units = one["counts"]["units"]
        assert one["done"] == 40
        assert one["counts"]["rows"] == one["least"]  # no row twice, from an empty cache
        assert sum(sum(tiers.values()) for tiers in units.values()) == 80 == sum(one["told"].values())
        assert sum(units["positive"].values()) == 40
    assert traffic["all unique"]["hit_rates"]["positive"] == 0
    assert traffic["Zipf 1"]["rows_per_job"] < traffic["all unique"]["rows_per_job"]


@pytest.mark.slow
@pytest.mark.cluster
def test_the_cache_is_on_on_one_side_and_off_on_the_other(tmp_path: Path) -> None:
    code, told = measured(tmp_path, "--only", "t5", "--rounds", "1", "--seconds", "12")
    assert code == 0
    assert told["traffic"] == []
    (one,) = told["paired"]["rounds"]  # type: ignore[index]
    assert one["requests"] > one["texts"]
    assert one["cached"]["hits"] > 0 == one["plain"]["hits"]
    assert one["cached"]["hit_seconds"]["p50"] < one["plain"]["seconds"]["p50"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--encoder", "clip-l"], "--encoder: clip-l is not one of t5-small, t5-base"),
        (["--encoder", "t5-small,t5-base"], "--encoder: name one"),
        (["--only", "t5,batching"], "--only: batching is not one of traffic, t5"),
    ],
)
def test_what_cannot_be_done_is_one_line(options: list[str], reason: str) -> None:
    with pytest.raises(OperatorError, match=reason):
        CliRunner().invoke(app, ["bench", "cache", *options], catch_exceptions=False)
