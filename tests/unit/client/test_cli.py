"""The command line as a user meets it: exit codes, one line for each mistake, files, and what Ctrl-C leaves behind."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.responses import JSONResponse

from serve.cli.app import main

TANDEM = [sys.executable, "-m", "serve.cli"]


def tandem(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tandem", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tandem: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_picture_is_saved_and_reported(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new folder" / "heart.png"
    options = ("--url", script.url, "--negative", "red", "--steps", 4, "--guidance", 3.5, "--seed", 9, "-o", file)
    assert tandem(monkeypatch, "generate", "a heart", *options) == 0
    assert Image.open(file).size == (8, 8)
    assert script.orders == [
        {
            "prompt": "a heart",
            "negative_prompt": "red",
            "num_images": 1,
            "num_inference_steps": 4,
            "guidance_scale": 3.5,
            "seed": 9,
        }
    ]
    report = capsys.readouterr().out
    assert f"{file}  (seed 9)" in report
    assert "prompt has 80 tokens, 75 fit into clip-l; cut: ' and more'" in report
    assert "1 from memory, 0 from Redis, 1 encoded" in report


def test_an_image_is_a_file_here_or_a_picture_there(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = tmp_path / "start.png"
    start.write_bytes(b"a picture")
    there = f"{'0' * 32}/mask"
    options = ("--image", start, "--mask", there, "--strength", 0.5, "--scheduler", "euler_a", "--aspect", "16:9")
    out = ("--true-cfg", 2, "--url", script.url, "-o", tmp_path)
    assert tandem(monkeypatch, "generate", "a heart", *options, *out) == 0
    order = {"image": base64.b64encode(b"a picture").decode(), "mask": there, "strength": 0.5}
    order |= {"scheduler": "euler_a", "aspect_ratio": "16:9", "true_cfg_scale": 2.0}
    assert script.orders[-1].items() >= order.items()
    capsys.readouterr()
    assert tandem(monkeypatch, "generate", "a heart", "--image", tmp_path / "none.png", *out) == 2
    assert "none.png: No such file" in one_line(capsys)
    assert len(script.orders) == 1


def test_several_pictures_get_numbers(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tandem(monkeypatch, "generate", "a heart", "-n", 2, "--url", script.url, "-o", tmp_path / "a.png") == 0
    assert tandem(monkeypatch, "generate", "a heart", "-n", 2, "--url", script.url, "-o", tmp_path / "b") == 0
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert names == ["a-0.png", "a-1.png", "b/tandem-01234567-0.png", "b/tandem-01234567-1.png"]


def test_the_format_is_what_out_ends_in_or_what_is_asked_for(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, options, sent in (
        ("a.webp", (), {"output_format": "webp"}),
        ("a.JPG", ("--quality", 80), {"output_format": "jpeg", "output_compression": 80}),
        ("b.png", ("--bit-depth", 16), {"bit_depth": 16}),
        ("folder", ("--format", "jpeg"), {"output_format": "jpeg"}),
    ):
        assert tandem(monkeypatch, "generate", "a heart", *options, "--url", script.url, "-o", tmp_path / out) == 0
        fields = ("output_format", "output_compression", "bit_depth")
        assert {name: script.orders[-1][name] for name in fields if name in script.orders[-1]} == sent
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert names == ["a.JPG", "a.webp", "b.png", "folder/tandem-01234567-0.jpg"]
    capsys.readouterr()
    clash = ("--format", "jpeg", "-o", tmp_path / "c.png")
    assert tandem(monkeypatch, "generate", "a heart", "--url", script.url, *clash) == 2
    assert "--format jpeg" in one_line(capsys)
    assert len(script.orders) == 4


def test_json_is_the_job_and_the_files(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tandem(monkeypatch, "generate", "a heart", "--json", "--url", script.url, "-o", tmp_path) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["job"]["state"] == "succeeded"
    assert [Path(file).is_file() for file in told["files"]] == [True]


def test_a_failed_job_is_exit_code_1_with_the_reason(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script.end = "failed"
    assert tandem(monkeypatch, "generate", "a heart", "--url", script.url, "-o", tmp_path) == 1
    assert "failed: not enough memory" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line_that_names_them(
    script: Any, nowhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tandem(monkeypatch, "generate", "x", "--url", nowhere) == 2
    assert "start one with `tandem up`" in one_line(capsys)
    error = {"message": "seed must be between 0 and 4294967295", "type": "x", "param": "seed", "code": "x"}
    script.refusal = JSONResponse({"error": error}, 422)
    assert tandem(monkeypatch, "generate", "x", "--seed=-1", "--url", script.url) == 2
    assert "seed must be between" in one_line(capsys)
    assert tandem(monkeypatch, "up", "--set", "http.port") == 2
    assert "ROOM.FIELD=VALUE" in one_line(capsys)
    assert tandem(monkeypatch, "up", "--set", "http.prot=1") == 2
    assert "http.prot: no such setting (from command line)" in one_line(capsys)
    assert tandem(monkeypatch, "config", "show", "--config", tmp_path / "no.yaml") == 2
    assert "no.yaml: No such file" in one_line(capsys)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert tandem(monkeypatch, "up", "--port", port, "--data-dir", tmp_path) == 2
        assert f"http.port: 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


def test_a_key_is_named_by_option_or_environment_and_its_refusal_is_one_line(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script.key = "tdm_abc_def"
    order = ("generate", "x", "--url", script.url, "-o", tmp_path)
    (tmp_path / "prompts").write_text("one\ntwo\n")
    for command in (order, ("cache", "stats", "--url", script.url), ("demo", "--port", script.url.rpartition(":")[2])):
        assert tandem(monkeypatch, *command) == 2
        captured = capsys.readouterr()
        assert captured.err.endswith("tandem: this server wants an API key; name a key with --key or in TANDEM_KEY\n")
    assert tandem(monkeypatch, "cache", "warm", tmp_path / "prompts", "--url", script.url, "--key", "tdm_other") == 2
    assert "tandem: this server wants an API key" in capsys.readouterr().err, "no line is to blame"
    assert tandem(monkeypatch, *order, "--key", script.key) == 0
    monkeypatch.setenv("TANDEM_KEY", script.key)
    capsys.readouterr()
    assert tandem(monkeypatch, "config", "show", "--json") == 0, "no setting, and no mistake"
    assert script.key not in capsys.readouterr().out
    assert tandem(monkeypatch, *order, "--priority", "batch") == 0
    assert script.orders[-1] == {"prompt": "x", "num_images": 1, "priority": "batch"}
    error = {"message": "more than 60 orders a minute", "type": "x", "param": None, "code": "rate_limited"}
    script.refusal = JSONResponse({"error": error}, 429, {"Retry-After": "12"})
    capsys.readouterr()
    assert tandem(monkeypatch, *order) == 2
    assert one_line(capsys) == "tandem: more than 60 orders a minute; try again in 12 s\n"


def test_a_file_that_can_t_be_written_is_named(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert tandem(monkeypatch, "generate", "x", "--url", script.url, "-o", tmp_path / "file" / "x.png") == 2
    assert "--out" in one_line(capsys)
    assert not script.orders, "nothing is drawn that can't be kept"


@pytest.mark.parametrize(
    "arguments", [["generate", "--seed", "x"], ["up", "--port", "x"], ["nonsense"], ["generate", "x", "--nope"]]
)
def test_wrong_usage_is_explained_without_a_trace(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tandem(monkeypatch, *arguments) == 2
    told = capsys.readouterr().err
    assert "Usage: tandem" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_whoever_stops_waiting_cancels_the_job(script: Any, tmp_path: Path, number: int, code: int) -> None:
    script.hang, script.cut = True, [2]
    process = subprocess.Popen([*TANDEM, "generate", "x", "--url", script.url, "-o", tmp_path], stderr=subprocess.PIPE)
    assert script.following.wait(20)
    process.send_signal(number)
    _, told = process.communicate(timeout=20)
    assert script.cancelled.is_set()
    assert process.returncode == code
    assert b"Traceback" not in told


def test_config_show_tells_values_origins_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tandem.yaml"
    file.write_text("limits:\n  max_num_images: 3\n")
    monkeypatch.setenv("TANDEM_JOBS__REDIS_URL", "redis://:hunter2@redis.example:6379/1")
    monkeypatch.setenv("TANDEM_CACHE__REDIS_URL", "redis://:hunter2/x@redis.example:6379/1")
    monkeypatch.setenv("TANDEM_RESULTS__S3__ENDPOINT_URL", "https://key:hunter2@minio.example:9000")
    assert tandem(monkeypatch, "config", "show", "--config", file, "--set", "http.port=9001", "--json") == 0
    told = capsys.readouterr().out
    assert "hunter2" not in told
    shown = json.loads(told)
    assert shown["limits.max_num_images"] == {"value": "3", "origin": f"file {file}"}
    assert shown["http.port"] == {"value": "9001", "origin": "command line"}
    assert shown["jobs.redis_url"]["origin"] == "environment TANDEM_JOBS__REDIS_URL"
    assert "redis.example:6379" in shown["jobs.redis_url"]["value"]
    assert shown["cache.redis_url"]["value"] == "**********"
    assert shown["results.s3.endpoint_url"]["value"] == "https://**********@minio.example:9000"
    assert shown["data_dir"]["origin"] == "default"
    assert tandem(monkeypatch, "config", "show") == 0
    assert "hunter2" not in capsys.readouterr().out


def test_help_and_version_need_neither_torch_nor_ray() -> None:
    probe = (
        "import sys; sys.argv = ['tandem', '--version']\n"
        "from serve.cli.app import main\n"
        "try:\n    main()\n"
        "finally:\n    print([name for name in ('torch', 'ray', 'transformers', 'fastapi') if name in sys.modules])"
    )
    told = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, env=dict(os.environ), check=True
    )
    version, imported = told.stdout.splitlines()
    assert version.startswith("tandem ")
    assert imported == "[]"


def test_the_demo_uses_the_server_that_is_up_and_fails_when_the_judge_rejects(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = script.url.rpartition(":")[2]
    assert tandem(monkeypatch, "demo", "--port", port, "--out", tmp_path / "demo") == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "stays up" in told
    assert "nothing on red" in told, "the judge looked at the pictures, which are all red"
    assert len(script.orders) == 6
    assert len({order["prompt"] for order in script.orders}) == 4
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        *(f"{n}.png" for n in range(1, 7)),
        "contact-sheet.png",
    ]


def test_the_demo_says_why_its_server_did_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        arguments = ("--port", port, "--data-dir", tmp_path, "--out", tmp_path / "demo")
        assert tandem(monkeypatch, "demo", *arguments) == 2
    told = capsys.readouterr().err
    assert f"tandem: the server ended: http.port: 127.0.0.1:{port}: Address already in use" in told
    assert str(tmp_path / "tandem.log") in told
