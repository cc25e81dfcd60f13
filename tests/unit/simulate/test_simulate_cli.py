"""`tandem simulate` from its files to its answer."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from serve.cli.app import main
from serve.simulate import fleet as fleets
from serve.simulate import fleet_parts
from serve.simulate.fleet import load
from serve.simulate.fleet_parts import Part
from serve.simulate.traffic import Line

ROOT = Path(__file__).parents[3]
FLEET = """
classes: {24gb: {price_per_hour: 0.30}, small: {like: Tesla T4, memory_gb: 16, dtypes: [float16, float32]}}
pools:
  fast: {model: sdxl, gpu_class: 24gb, replicas: 6}
  cheap: {model: sd15, gpu_class: small, replicas: 2}
  none: {model: sdxl, gpu_class: 80gb, replicas: 0}
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    fleet, trace = tmp_path / "fleet.yaml", tmp_path / "trace.jsonl"
    fleet.write_text(FLEET)
    lines = [{"due_s": 2.0 * n, "model": ("sdxl", "sd15")[n % 2], "owner": f"o{n % 3}", "steps": 8} for n in range(30)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    return fleet, trace


def tandem(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tandem", "simulate", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_a_trace_is_computed_and_told_as_json_and_plots(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert tandem(monkeypatch, *files, "--p95", 20, "--out", out, "--json") == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told == json.loads((out / "result.json").read_text())
    assert told["orders"] == {"all": 30, "done": 30}
    assert {pool["name"]: pool["images"] for pool in told["pools"]} == {"fast": 15, "cheap": 15}
    assert told["pools"][0]["cost"] == pytest.approx(6 * 0.30 * 58 / 3600)
    assert 0 < told["latency_s"]["p50"] <= told["latency_s"]["p95"] < 20
    assert 0 < told["redis"]["busy"] < 0.1
    assert told["redis"]["saturates_at"]["orders_per_s"] > 1
    assert [each["pool"] for each in told["sizes"]] == ["fast", "cheap", "none"]
    assert all(each["replicas"] >= 1 for each in told["sizes"])
    plots = {"course", "latency", "redis", "sizes"}
    assert {file.stem for file in out.glob("*.png")} == plots
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in plots)


def test_a_workload_of_the_load_test_is_traffic_too(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tandem(monkeypatch, files[0], "burst", "--rate", 0.5, "--duration", 60) == 0
    told = capsys.readouterr().out
    assert "30 orders" in told
    assert "One job Redis" in told


@pytest.mark.parametrize(
    ("fleet", "trace", "told"),
    [
        ("pools: {a: {model: sdxl, gpu_class: 24gb}}", "", "pools.a.replicas"),
        ("pools: {a: {model: nothing, gpu_class: 24gb, replicas: 1}}", "", "pools.a.model: there is no nothing"),
        ("pools: {a: {model: sdxl, gpu_class: 2gb, replicas: 1}}", "", "classes: there is no 2gb"),
        (
            "classes: {x: {like: Abacus, memory_gb: 9}}\npools: {a: {model: sdxl, gpu_class: x, replicas: 1}}",
            "",
            "Abacus",
        ),
        (
            "pools: {a: {model: flux-dev, gpu_class: 4gb, replicas: 1, diffusion: {worst_rung: resident}}}",
            "{}",
            "line 1",
        ),
        ("", "", "fleet.yaml: Input should be a valid dictionary"),
        ("pools: {}", "", "pools: "),
        ("pools: [", "", "fleet.yaml: while parsing"),
        ("pools: {a: {model: sdxl, gpu_class: 24gb, replicas: 0}}", '{"due_s": 1}', "pools: none has replicas"),
        ("pools: {a: {model: sdxl, gpu_class: 24gb, replicas: 1000000000}}", "", "pools.a.replicas"),
        (
            "pools: {a: {model: sdxl, gpu_class: 24gb, replicas: 2, min_replicas: 3}}",
            "",
            "pools.a: min_replicas 3 is more than replicas 2",
        ),
        (
            "pools: {a: {model: sdxl, gpu_class: 24gb, replicas: 2, max_replicas: 1}}",
            "",
            "pools.a: replicas 2 is more than max_replicas 1",
        ),
        (
            "pools: {a: {model: sdxl, gpu_class: 24gb, replicas: 2, diffusion: {replicas: 9}}}",
            "",
            "pools.a: diffusion: replicas is the pool's own key",
        ),
        (
            "pools: {a: {model: sdxl, gpu_class: 24gb, replicas: 2, diffusion: {max_batch_size: many}}}",
            "",
            "pools.a.diffusion.max_batch_size",
        ),
        ("pools: {a: {model: sdxl, gpu_class: 24gb, replicas: 2, mtbf_h: 0}}", "", "pools.a.mtbf_h"),
        (FLEET + "jobs: {max_queued: 0}", "", "jobs.max_queued"),
        (FLEET + "text_ms: .inf", "", "text_ms"),
        (FLEET + "colour: 3", "", "colour"),
        (FLEET, '{"due_s": NaN}', "line 1: due_s"),
        (FLEET, '{"due_s": 1e300}', "line 1: due_s"),
        (FLEET, '[{"due_s": 1}]', "line 1: Input should be a valid dictionary"),
        (FLEET, '{"due_s": 1, "width": 1001}', "line 1: width: sdxl draws multiples of 8 pixels"),
        (FLEET, '{"due_s": 1, "scheduler": "magic"}', "line 1: scheduler: there is no magic"),
        (FLEET, '{"due_s": 1, "model": "flux-dev"}', "line 1: model: no pool draws flux-dev"),
        (FLEET, '{"due_s": 1, "colour": 3}', "line 1: colour"),
        (FLEET, "no json", "line 1"),
        (FLEET, "", "no order in it"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(
    fleet: str,
    trace: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = tmp_path / "fleet.yaml", tmp_path / "trace.jsonl"
    for file, text in zip(files, (fleet, trace), strict=True):
        file.write_text(text)
    assert tandem(monkeypatch, *files) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nothing"], "workload nothing: there are"),
        (["mixed"], "mixed: its rate is"),
        (["mixed", "--rate", "1e6", "--duration", "86400"], "mixed: 86,400,000,000 orders are more than 10,000,000"),
        (["missing.jsonl"], "missing.jsonl: No such file or directory"),
        (["missing.jsonl", "--rate", "3"], "--rate and --duration are for workloads"),
    ],
)
def test_what_is_wrong_with_a_trace_by_name_is_one_line_too(
    arguments: list[str],
    told: str,
    files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tandem(monkeypatch, files[0], *arguments) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_trace_of_which_nothing_is_drawn_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet, trace, out = tmp_path / "fleet.yaml", tmp_path / "trace.jsonl", tmp_path / "out"
    fleet.write_text(
        "pools: {a: {model: sd15, gpu_class: 4gb, replicas: 1, min_replicas: 0, diffusion: {max_pixels: 262144}}}"
    )
    trace.write_text('{"due_s": 1, "width": 2048, "height": 2048}')
    assert tandem(monkeypatch, fleet, trace, "--p95", 20, "--out", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["orders"] == {"all": 1, "refused": 1}
    assert found["latency_s"]["p50"] is None
    assert found["sizes"][0]["why"] == "its cards do not hold 2048 x 2048"
    assert (found["pools"][0]["least"], found["pools"][0]["most"]) == (0, 1)
    assert (out / "replicas.png").read_bytes().startswith(b"\x89PNG")


def test_every_key_of_the_two_files_is_documented() -> None:
    page = (ROOT / "docs" / "simulate.md").read_text()
    found = {**vars(fleets), **vars(fleet_parts)}.values()
    parts = {each for each in found if isinstance(each, type) and issubclass(each, Part)} - {Part}
    for part in (*parts, Line):
        for name, field in part.model_fields.items():
            row = f"| `{name}` | {' '.join((field.description or '').split())} |"
            assert row in page, row


def test_the_example_of_the_docs_is_a_fleet(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "simulate.md").read_text()
    file = tmp_path / "fleet.yaml"
    file.write_text(page.split("```yaml\n", 1)[1].split("```", 1)[0])
    assert load(file).pools
