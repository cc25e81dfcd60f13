"""`tandem fetch`: everything here before a server starts, once, however many ask for it at the same time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import checkpoints
from support.image_models import sd_model

from serve.models import SHIPPED

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fetching(*arguments: object, **environment: object) -> subprocess.Popen[str]:
    """`tandem fetch` as a pod runs it: without Redis, GPU or a way to the hub."""
    given = {name: str(value) for name, value in environment.items()}
    return subprocess.Popen(
        [sys.executable, "-m", "serve.cli", "fetch", *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | given,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(process: "subprocess.Popen[str]") -> list[str]:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out.splitlines()


def refused(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=200)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1), err
    return err.removeprefix("tandem: ").rstrip()


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
def test_several_at_once_convert_a_checkpoint_once_and_leave_nothing_to_do(tmp_path: Path) -> None:
    file = checkpoints.write(checkpoints.sd(SHIPPED), tmp_path / "one.safetensors")
    folder = sd_model(tmp_path / "two")
    data, config = tmp_path / "data", tmp_path / "tandem.yaml"
    config.write_text(
        f"data_dir: {data}\nmodel: {{source: {file}, config: {SHIPPED}}}\nmodels: [{{source: {folder}}}]\n"
    )
    first, second = [told(each) for each in (fetching("--config", config), fetching(TANDEM_CONFIG=config))]
    (made,) = (each for each in (data / "models").iterdir() if each.name != ".lock")
    assert first == second
    assert first == [f"one: sd, {made}, {size(made):,} bytes", f"two: sd, {folder}, {size(folder):,} bytes"]

    kept = {each: each.stat().st_mtime_ns for each in data.rglob("*") if each.is_file() and each.name != ".lock"}
    assert {each.parent.name for each in kept} >= {"fingerprints", "unet"}
    assert told(fetching(TANDEM_CONFIG=config)) == first
    assert all(each.stat().st_mtime_ns == changed for each, changed in kept.items())


def test_a_model_of_the_hub_is_taken_from_the_hub_s_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "hf" / "hub" / "models--acme--tiny" / "snapshots" / COMMIT
    shutil.copytree(sd_model(tmp_path / "sd"), snapshot)
    model = ("--set", "model.source=acme/tiny", "--set", f"model.revision={COMMIT}", "--data-dir", tmp_path / "data")
    assert told(fetching(*model, HF_HOME=tmp_path / "hf")) == [f"tiny: sd, {snapshot}, {size(snapshot):,} bytes"]
    message = refused(fetching(*model, HF_HOME=tmp_path / "empty"))
    assert message == f"model.source: the hub does not answer, and acme/tiny at {COMMIT} is not in the local hub cache"


def test_what_cannot_be_served_is_named_in_one_line(tmp_path: Path) -> None:
    assert refused(fetching("--set", "model.source=/nowhere", "--data-dir", tmp_path)) == (
        "model.source: /nowhere does not exist"
    )
    (tmp_path / "file").write_text("")
    assert refused(fetching("--data-dir", tmp_path / "file" / "data")).startswith("data_dir: ")
    assert "TANDEM_HTTP__PROT" in refused(fetching("--data-dir", tmp_path, TANDEM_HTTP__PROT="1"))
