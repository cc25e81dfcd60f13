"""The load test's clients of every dialect, on a server that draws."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.drawing import Drawing

WORKLOAD = """
description: One after the other, in every dialect.
arrivals: {process: closed, users: 2, orders: 12}
duration_s: 60
dialects: {wait: 1, openai: 1, a1111: 1, imagen: 1}
"""


@pytest.mark.slow
def test_every_dialect_s_client_gets_its_pictures(drawing: Drawing, tmp_path: Path) -> None:
    workload, out = tmp_path / "each.yaml", tmp_path / "out"
    workload.write_text(WORKLOAD)
    command = [sys.executable, "-m", "serve.cli", "loadtest", str(workload), "--target", drawing.url, "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    samples = json.loads((out / "result.json").read_text())["samples"]
    assert {sample["outcome"] for sample in samples} == {"done"}
    assert {sample["dialect"] for sample in samples} == {"wait", "openai", "a1111", "imagen"}
    assert all(sample["bytes"] > 500 for sample in samples)
