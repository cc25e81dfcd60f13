"""`tandem loadtest` and Locust's own page, against a small server that speaks the native dialect."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.obedient_server import obedient
from typer.testing import CliRunner

from loadtest.workload import names
from serve.cli import extras
from serve.cli.app import app
from serve.errors import OperatorError

ROOT = Path(__file__).parents[3]
WORKLOAD = """
description: Everybody, for a moment.
arrivals: {process: poisson, rate: 20}
duration_s: 1
dialects: {wait: 1, events: 1, poll: 1, embeddings: 1}
prompts: {negative: {repetition: fixed}}
thresholds:
  failed_ratio: {at_most: 0}
  p50_s: {at_most: BOUND}
"""


def tandem(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serve.cli", "loadtest", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def written(folder: Path, bound: float = 60) -> Path:
    file = folder / "mine.yaml"
    file.write_text(WORKLOAD.replace("BOUND", str(bound)))
    return file


def test_a_missed_threshold_is_exit_code_1_and_a_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with obedient() as server:
        done = tandem(written(tmp_path, bound=0.000001), "--target", server.url, "--out", out)
    assert done.returncode == 1, done.stderr
    assert "missed" in done.stdout
    assert "failed_ratio" in done.stdout
    assert "mine: 20 requests, over 1 s" in done.stderr
    result = json.loads((out / "result.json").read_text())
    assert len(result["samples"]) == 20
    assert {sample["outcome"] for sample in result["samples"]} == {"done"}
    assert {sample["dialect"] for sample in result["samples"]} == {"wait", "events", "poll", "embeddings"}
    assert result["settings"]["seed"] == 0
    assert (out / "report.html").is_file()
    assert list(out.glob("*.png"))


@pytest.mark.slow
def test_met_thresholds_are_exit_code_0_and_a_load_is_of_a_measured_capacity(tmp_path: Path) -> None:
    file = written(tmp_path)
    file.write_text(file.read_text().replace("rate: 20", "load: 0.02"))
    with obedient() as server:
        done = tandem(file, "--target", server.url, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert "measuring the capacity" in done.stderr
    told = json.loads(done.stdout)
    assert told["met"]
    assert told["figures"]["goodput_ratio"] == 1
    assert "requests a second; 0.02 times as many are" in done.stderr


@pytest.mark.slow
def test_an_interrupted_run_reports_what_there_is_and_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve.cli", "loadtest", str(written(tmp_path)), "--duration", "600"]
    with obedient() as server:
        running = psutil.Popen([*command, "--target", server.url, "--out", str(tmp_path / "out")])
        try:
            deadline = time.monotonic() + 60
            while server.seen["POST /v1/jobs"] < 20:
                assert time.monotonic() < deadline
                assert running.poll() is None
                time.sleep(0.05)
            children = running.children(recursive=True)
            running.send_signal(signal.SIGINT)
            assert running.wait(60) == 130
        finally:
            if running.is_running():
                running.kill()
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert 10 < len(result["samples"]) < 6000
    assert result["duration_s"] < 100
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_the_operators_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OperatorError is exit code 2 and that line (tests/unit/client/test_cli.py)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    mistakes: dict[tuple[object, ...], str] = {
        ("nope",): "workload nope: there are burst",
        (): "loadtest: name a WORKLOAD",
        ("mixed", "--rate", 1, "--capacity", 1): "--rate and --capacity: name one of them",
        ("unique", "--duration", 5, "--capacity", 1, "--rate", 1): "--rate and --capacity: name one of them",
        ("seed-sweep", "--capacity", 1): "--capacity: seed-sweep has no load",
        ("mixed", "--out", tmp_path / "file" / "out", "--target", "http://127.0.0.1:1"): "--out ",
        ("mixed", "--key", "ключ"): "--key or TANDEM_KEY: that is not an API key",
        ("mixed", "--metrics", "localhost:9090"): "metrics localhost:9090: write the http:// address",
        ("mixed", "--target", "http://127.0.0.1:1"): "--target: no server answers at http://127.0.0.1:1",
    }
    for words, line in mistakes.items():
        done = CliRunner().invoke(app, ["loadtest", *map(str, words)])
        assert isinstance(done.exception, OperatorError), (words, done.exception)
        assert done.exception.message.startswith(line)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert all(name in CliRunner().invoke(app, ["loadtest", "--list"]).stdout for name in names())


def test_a_package_that_is_not_there_is_one_line_that_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.argv = ['tandem', 'loadtest', 'mixed'];"
        "from serve.cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "tandem: matplotlib is not installed: pip install 'tandem-serve[loadtest]'\n"
    with pytest.raises(OperatorError, match="no_such_package is not installed"):
        extras.want("no_such_package")
    with pytest.raises(ModuleNotFoundError):  # a fault of ours, not of the installation
        extras.loadtest("no_such_module:thing")


@pytest.mark.slow
def test_plain_locust_runs_a_workload_to_its_end(tmp_path: Path) -> None:
    with obedient() as server:
        done = locust("--workload", str(written(tmp_path)), "--host", server.url, "--headless", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        stats = {entry["name"]: entry for entry in json.loads(done.stdout)}
        assert set(stats) == {"wait", "events", "poll", "embeddings"}
        assert sum(entry["num_requests"] for entry in stats.values()) == 20
        failed = locust("--workload", "mixed", "--host", server.url, "--headless", cwd=tmp_path)
    assert failed.returncode == 2
    assert "tandem: mixed: its rate is 0.8 times a capacity" in failed.stdout


def locust(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=cwd)


@pytest.mark.slow
def test_locusts_page_shows_the_same_requests(tmp_path: Path, free_port: int) -> None:
    command = [sys.executable, "-m", "serve.cli", "loadtest", str(written(tmp_path)), "--web", "--web-port"]
    with obedient() as server, httpx.Client(base_url=f"http://127.0.0.1:{free_port}", timeout=10) as page:
        running = psutil.Popen([*command, str(free_port), "--target", server.url], cwd=tmp_path)
        try:
            deadline = time.monotonic() + 60
            told: dict[str, Any] = {}
            while not told:
                assert time.monotonic() < deadline
                try:
                    if page.get("/").is_success:
                        told = page.post("/swarm", data={"user_count": 1, "spawn_rate": 1}).json()
                except httpx.TransportError:
                    time.sleep(0.1)
            assert told["success"]
            stats = page.get("/stats/requests").json()
            while stats["state"] != "stopped":
                assert time.monotonic() < deadline
                time.sleep(0.1)
                stats = page.get("/stats/requests").json()
        finally:
            children = running.children(recursive=True)
            running.send_signal(signal.SIGINT)
            running.wait(30)
    assert {entry["name"] for entry in stats["stats"]} == {"wait", "events", "poll", "embeddings", "Aggregated"}
    assert stats["stats"][-1]["num_requests"] == 20
    assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.mark.slow
def test_locusts_page_ends_with_whoever_started_it(tmp_path: Path, free_port: int) -> None:
    """Killed outright, that one can end nothing itself."""
    command = [sys.executable, "-m", "serve.cli", "loadtest", str(written(tmp_path)), "--web", "--web-port"]
    with obedient() as server, httpx.Client(base_url=f"http://127.0.0.1:{free_port}", timeout=10) as page:
        running = psutil.Popen([*command, str(free_port), "--target", server.url], cwd=tmp_path)
        try:
            deadline = time.monotonic() + 60
            while True:
                assert time.monotonic() < deadline
                try:
                    if page.get("/").is_success:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
        finally:
            children = running.children(recursive=True)
            running.kill()
            running.wait(30)
    assert children
    assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
