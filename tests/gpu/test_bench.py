"""`tandem bench gpu` as it is typed."""

import json
import subprocess
import sys
from pathlib import Path


def test_the_command_measures_every_section_and_writes_its_figures(tmp_path: Path) -> None:
    """sd15 alone; memory by rung has tests of its own."""
    file, page = tmp_path / "figures.json", tmp_path / "figures.md"
    options = ["--quick", "--models", "sd15", "--only", "memory,steps,images,compile,encoders"]
    command = [str(Path(sys.executable).with_name("tandem")), "bench", "gpu", *options]
    done = subprocess.run([*command, "--json", str(file), "--markdown", str(page)], text=True, check=False)
    assert done.returncode == 0
    figures = json.loads(file.read_text())
    assert figures["left_out"] == []
    assert [one["model"] for one in figures["memory"]] == ["sd15"]
    assert {one["lanes"] for one in figures["steps"]} == {1, 2, 8}
    assert figures["images"][0]["images_per_s"] > 0.1
    assert all(one["compiled_s"] < 2 * one["seconds"] for one in figures["compile"])
    assert [one["encoder"] for one in figures["encoders"]] == ["clip-l", "openclip-bigg", "t5-xxl"]
    assert "Steps by batch" in page.read_text()
