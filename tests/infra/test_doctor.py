"""`tandem doctor`: the command, and what it says of models, cards, versions, doors and whom the server calls."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from support.collector import Collector

from serve.cli.app import main
from serve.doctor import access, machine, server, versions
from serve.doctor.findings import Finding
from serve.doctor.gpus import check_gpus
from serve.doctor.model_files import check_concepts, check_models
from serve.models import SHIPPED
from serve.settings.tree import Settings

ROOT = Path(__file__).parents[2]
Driver = Callable[[str], None]


@pytest.fixture
def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Puts an `nvidia-smi` on PATH that is a script of the shell; none before."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin")

    def write(script: str) -> None:
        tool = folder / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)

    return write


@pytest.fixture
def doctor(
    tmp_path: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        monkeypatch.setattr(sys, "argv", ["tandem", "doctor", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        told = capsys.readouterr()
        return int(end.value.code or 0), told.out, told.err

    return run


def faults(found: list[Finding]) -> dict[str, Finding]:
    """What is not as it should be."""
    assert all(each.cure for each in found if each.level != "ok")
    return {f"{each.level} {each.code}": each for each in found if each.level != "ok"}


def test_a_machine_on_which_a_server_may_start(
    doctor: Callable[..., tuple[int, str, str]], free: int, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    options = ("--data-dir", tmp_path / "data", "--set", f"http.port={free}")
    code, out, _ = doctor(*options, "--json")
    found = json.loads(out)
    assert code == 0
    assert {each["level"] for each in found} == {"ok"}
    assert {"http.port", "data_dir", "jobs.redis_url", "model.source", "keys.required"} <= {
        each["setting"] for each in found
    }
    assert sorted(tmp_path.rglob("*")) == before, "nothing is made"
    code, every, err = doctor(*options, "--all")
    *lines, last = every.splitlines()
    assert (code, last, err) == (0, f"0 faults, 0 warnings, {len(found)} ok", "")
    assert all(line.endswith(f"[{each['code']}]") for line, each in zip(lines, found, strict=True))


def test_a_fault_is_a_line_and_the_exit_code(doctor: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, out, _ = doctor("--set", f"http.port={port}", "--data-dir", tmp_path, "--url", "http://127.0.0.1:1")
    assert code == 1
    (line,) = [each for each in out.splitlines() if each.startswith("fault")]
    assert re.search(rf"http\.port +127.0.0.1:{port}: Address already in use -> .+ \[port-taken\]", line)
    assert "1 fault, 0 warnings" in out


def test_settings_that_are_none_are_told_as_everywhere(doctor: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = doctor("--set", "http.prot=1")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "http.prot" in err


@pytest.mark.slow
def test_a_process_that_may_open_few_files(tmp_path: Path) -> None:
    """Cannot be undone in a process that is not root's."""
    asked = f"ulimit -n 1100 && exec {sys.executable} -m serve.cli doctor --json --data-dir {tmp_path}"
    told = subprocess.run(["/bin/sh", "-c", asked], capture_output=True, text=True, check=False)
    found = {each["code"]: each["level"] for each in json.loads(told.stdout)}
    assert (told.returncode, found["open-files"]) == (1, "fault")


def test_a_machine_s_small_rooms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int) -> None:
    """Where the disks of this machine stand against other bounds."""
    settings = Settings(http={"port": free}, metrics={"port": free})
    assert faults(machine.check_machine(settings, serving=False)) == {}
    monkeypatch.setattr(machine, "LEAST_SHM_BYTES", 1 << 60)
    monkeypatch.setattr(machine, "FULL_DISK", -1.0)
    monkeypatch.setattr(machine, "SHM", tmp_path)
    assert set(faults(machine.check_machine(settings, serving=False))) == {
        "warning shared-memory",
        "warning temporary-full",
    }


def test_models_that_are_not_whole_not_safe_or_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cut, pickled = (Path(shutil.copytree(SHIPPED, tmp_path / name)) for name in ("cut", "pickled"))
    unet = cut / "unet" / "diffusion_pytorch_model.safetensors"
    with unet.open("r+b") as file:
        file.truncate(unet.stat().st_size - 1)
    weights = pickled / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    hub, commit = "someone/some-model", "0123456789abcdef0123456789abcdef01234567"
    settings = Settings(
        data_dir=tmp_path / "data",
        model={"source": str(cut)},
        models=[{"source": str(pickled)}, {"source": hub}, {"source": hub, "revision": commit}, {"source": "shapes"}],
        text_models=[{"source": "shapes"}],
    )
    found, whole = check_models(settings)
    told = [(each.level.value, each.code, each.setting) for each in found]
    assert told == [
        ("fault", "model-files", "model.source"),
        ("fault", "model-files", "models.0.source"),
        ("fault", "model-files", "models.1.revision"),
        ("warning", "model-not-here", "models.2.source"),
        ("ok", "model-files", "models.3.source"),
        ("fault", "model-names", "text_models.0.name"),
    ]
    assert "is cut off" in found[0].told
    assert "is pickled" in found[1].told
    assert commit in found[3].told
    assert list(whole) == ["shapes"]
    assert set(faults(check_gpus(settings, whole))) == {"warning plan-unknown"}
    assert not (tmp_path / "data").exists(), "nothing is fetched or converted"


def test_a_captions_model_is_looked_at_too(tmp_path: Path) -> None:
    found, whole = check_models(Settings(captions={"source": str(tmp_path / "nowhere")}))
    assert [(each.level.value, each.setting) for each in found] == [
        ("ok", "model.source"),
        ("fault", "captions.source"),
    ]
    assert list(whole) == ["shapes"], "which no placement draws with"


def test_a_checkpoint_that_has_to_be_converted(tmp_path: Path) -> None:
    file = tmp_path / "xl.safetensors"
    file.write_bytes(_CHECKPOINT)
    found, _ = check_models(Settings(data_dir=tmp_path / "data", model={"source": str(file)}))
    assert set(faults(found)) == {"warning model-not-here"}
    assert not (tmp_path / "data").exists()


def _header(*names: str) -> bytes:
    tensors = {name: {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]} for name in names}
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + b"\0\0"


_CHECKPOINT = _header(
    "model.diffusion_model.input_blocks.0.0.weight",
    "first_stage_model.encoder.conv_in.weight",
    "cond_stage_model.transformer.weight",
)


def test_concepts_that_no_model_can_use(tmp_path: Path) -> None:
    folder = tmp_path / "concepts"
    settings = Settings(data_dir=tmp_path)
    _, models = check_models(settings)
    assert check_concepts(settings, models) == []
    away = Settings(data_dir=tmp_path, concepts={"folder": folder})
    assert set(faults(check_concepts(away, models))) == {"warning concepts-away"}
    folder.mkdir()
    assert check_concepts(away, models) == []
    (folder / "cat.safetensors").write_bytes(b"not at all")
    (unusable,) = faults(check_concepts(settings, models)).values()
    assert (unusable.code, "cat" in unusable.told) == ("concept-unusable", True)


TURING = 'echo "NVIDIA GeForce RTX 2080 Ti, 11264, 7.5"; echo "NVIDIA GeForce RTX 3050, 4096, 8.6"'


def on_cards(**tree: object) -> dict[str, Finding]:
    settings = Settings(**tree)  # type: ignore[arg-type]
    return faults(check_gpus(settings, check_models(settings)[1]))


def test_cards_without_classes(driver: Driver) -> None:
    assert on_cards() == {}, "no driver, and nobody asks for one"
    assert set(on_cards(diffusion={"num_gpus": 1})) == {"warning no-cards"}
    driver("echo 'no devices were found'; exit 6")
    (failed,) = on_cards().values()
    assert (failed.level, failed.code) == ("fault", "driver")
    driver(TURING)
    found = check_gpus(Settings(), check_models(Settings())[1])
    assert set(faults(found)) == {"fault torch-cuda"}, "the torch of the tests is built for CPUs"
    assert [each.code for each in found].count("plan") == 2, "one for each kind of card"


def test_placements_that_share_a_card_are_planned_for_their_share(driver: Driver) -> None:
    driver('echo "NVIDIA GeForce RTX 2080 Ti, 11264, 7.5"')
    settings = Settings(placements={"one": {"max_batch_size": 1}, "two": {"max_batch_size": 2}})
    found = check_gpus(settings, check_models(settings)[1])
    assert [("of 5.3 GB" in each.told) for each in found if each.code == "plan"] == [True, True]
    short = on_cards(diffusion={"num_gpus": 1, "replicas": 3})
    assert short["warning gpus-short"].setting == "diffusion.num_gpus"


def test_classes_against_the_cards_that_are_here(driver: Driver) -> None:
    driver(TURING)
    classes = {
        "11gb": {"memory_gb": 11, "dtypes": ["bfloat16", "float16"]},
        "80gb": {"memory_gb": 80},
        "24gb": {"memory_gb": 24},
    }
    placements = {
        "large": {"gpu_class": "80gb", "num_gpus": 1},
        "small": {"gpu_class": "11gb"},
    }
    found = on_cards(gpu_classes=classes, placements=placements)
    assert set(found) == {
        "fault torch-cuda",
        "fault class-dtypes",
        "warning class-without-card",
        "warning class-unused",
        "warning card-without-class",
        "warning placement-no-gpu",
    }
    assert found["fault class-dtypes"].cure == "dtypes: [float16, float32]"
    assert found["warning class-without-card"].setting == "gpu_classes.80gb"
    assert found["warning class-unused"].setting == "gpu_classes.24gb"
    assert "RTX 3050" in found["warning card-without-class"].told


def test_what_the_plan_does_not_fit(driver: Driver) -> None:
    tiny = {"gpu_classes": {"tiny": {"memory_gb": 0.001}}, "placements": {"all": {"gpu_class": "tiny", "num_gpus": 1}}}
    assert "fault placement" in on_cards(**tiny)
    large = {"all": {"gpu_class": "tiny", "num_gpus": 1, "max_pixels": 4_000_000}}
    found = on_cards(gpu_classes={"tiny": {"memory_gb": 0.05}}, placements=large)
    assert found["warning plan-not-fitting"].setting == "placements.all.gpu_class"


def test_packages_of_other_versions() -> None:
    fine = "redis[hiredis]>=5"
    asked = [fine, "pydantic>=999", "not-there-at-all", 'never-asked; extra == "dev"']
    found = list(versions.against(asked, {"redis": "0.1"}))
    assert [(each.level.value, each.code) for each in found] == [
        ("warning", "version-untested"),
        ("fault", "version-package"),
        ("fault", "version-package"),
    ]
    assert list(versions.against([fine], {})) == []


def test_packages_here_are_those_of_the_constraints() -> None:
    """Which the tests of this checkout are run with: else they say nothing of what is installed by it."""
    assert faults(versions.check_versions(Settings())) == {}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"http": {"host": "0.0.0.0"}}, {"fault keys-none"}),
        ({"http": {"host": "0.0.0.0"}, "keys": {"required": False}}, {"warning keys-off"}),
        (
            {"http": {"host": "0.0.0.0", "benchmark": True}, "keys": {"required": False}},
            {"warning keys-off", "warning benchmark-open"},
        ),
        ({"keys": {"required": True}}, {"fault keys-none"}),
        ({}, set()),
        ({"http": {"host": "0.0.0.0"}, "keys": {"first": f"tdm_{'a' * 12}_{'b' * 43}"}}, set()),
    ],
)
def test_doors(tree: dict[str, object], expected: set[str], tmp_path: Path) -> None:
    assert set(faults(access.check_access(Settings(data_dir=tmp_path, **tree)))) == expected  # type: ignore[arg-type]


def test_keys_that_are_in_redis_are_found(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"data_dir": tmp_path, "keys": {"required": True}, "jobs": {"redis_url": redis_url}}
    assert set(faults(access.check_access(Settings(**tree)))) == {"fault keys-none"}
    words = ["tandem", "keys", "create", "ada", "--set", f"jobs.redis_url={redis_url}"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        main()
    assert faults(access.check_access(Settings(**tree))) == {}


def test_whom_the_server_calls() -> None:
    secret = "whsec_" + "QUFB" * 8
    hosts = {"allowed_hosts": ["localhost:8443", "*.example.org"], "secret": secret}
    found = faults(access.check_access(Settings(webhooks=hosts)))
    assert set(found) == {"warning webhook-links", "fault webhook-not-public"}
    assert "localhost:8443" in found["fault webhook-not-public"].told
    private = {**hosts, "allow_private": True, "public_url": "https://images.example.com"}
    assert set(faults(access.check_access(Settings(webhooks=private)))) == {"warning webhook-private"}
    nowhere = {**private, "allow_private": False, "allowed_hosts": ["no host at all"]}
    assert set(faults(access.check_access(Settings(webhooks=nowhere)))) == {"warning webhook-host"}


def test_a_collector_of_traces() -> None:
    with Collector() as collector:
        tracing = {"endpoint": collector.url, "headers": "x-key=a%20secret"}
        assert faults(access.check_access(Settings(tracing=tracing))) == {}
        assert collector.headers["x-key"] == "a secret"
        assert collector.spans == []
        collector.status = 403
        assert faults(access.check_access(Settings(tracing=tracing)))["warning tracing-refused"].setting == (
            "tracing.headers"
        )
        collector.status = 404
        (path,) = faults(access.check_access(Settings(tracing=tracing))).values()
        assert (path.code, path.setting) == ("tracing-refused", "tracing.endpoint")
    assert set(faults(access.check_access(Settings(tracing=tracing)))) == {"warning tracing-away"}


@pytest.fixture
def stranger() -> Iterator[str]:
    """URL of a server that is none of ours."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{listener.server_port}"
        listener.shutdown()
        thread.join()


def test_a_server_that_is_none_of_ours_or_none_at_all(stranger: str) -> None:
    seen = server.check_server(stranger)
    assert (seen.serving, [each.code for each in seen.findings]) == (False, ["server-foreign"])
    seen = server.check_server("http://127.0.0.1:1")
    assert (seen.serving, [each.level for each in seen.findings]) == (False, ["ok"])


def test_every_finding_is_explained_in_the_manual() -> None:
    sources = "\n".join(file.read_text() for file in (ROOT / "serve" / "doctor").glob("*.py"))
    codes = set(re.findall(r'(?:warning|fault|refused|tell|tried|_refusal)\(\s*"([a-z0-9-]+)"', sources))
    manual = (ROOT / "docs" / "operations.md").read_text()
    rows = set(re.findall(r"^\| `([a-z0-9-]+)` \|", manual, re.MULTILINE))
    assert len(codes) > 40
    assert rows == codes
