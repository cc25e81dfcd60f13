"""`tandem demo` as `make demo` runs it: six accepted pictures, and nothing left running, however it ends."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from PIL import Image

pytestmark = pytest.mark.cluster


class Demo:
    """Owns: one `tandem demo`, watched for every process that comes of it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder = folder
        self.family: set[psutil.Process] = set()
        arguments = ["--port", str(port), "--data-dir", str(folder / "data"), "--out", str(folder / "out"), "--no-keep"]
        self.output = folder / "demo.log"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serve.cli", "demo", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A test that runs in the background of a shell would hand down that it hears none.
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.look()
            assert time.monotonic() < deadline, (self.output.read_text(errors="replace"), self.left())
            time.sleep(0.05)

    def look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family |= set(psutil.Process(self.process.pid).children(recursive=True))

    def ended(self) -> bool:
        return self.process.poll() is not None

    def left(self) -> list[psutil.Process]:
        return [process for process in self.family if process.is_running() and _status(process) != psutil.STATUS_ZOMBIE]

    def started_ray(self) -> bool:
        return any("raylet" in _name(process) for process in self.family)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.Error:
        return str(psutil.STATUS_ZOMBIE)


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(tmp_path)
    yield demo
    if not demo.ended():
        demo.process.terminate()
        demo.process.wait(60)


def test_six_pictures_that_the_judge_accepts(demo: Demo) -> None:
    demo.wait_until(demo.ended, 180)
    told = demo.output.read_text()
    assert demo.process.returncode == 0, told
    assert "Six pictures in" in told
    assert "Stopping the server" in told
    out = demo.folder / "out"
    assert [Image.open(out / f"{number}.png").size for number in range(1, 7)] == [(128, 128)] * 6
    assert Image.open(out / "contact-sheet.png").width > 3 * 256
    demo.wait_until(lambda: not demo.left(), 20)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow)],
)
def test_whatever_ends_it_ends_all_that_it_started(demo: Demo, number: int, code: int) -> None:
    demo.wait_until(demo.started_ray, 60)
    demo.process.send_signal(number)
    demo.wait_until(demo.ended, 60)
    assert demo.process.returncode == code
    demo.wait_until(lambda: not demo.left(), 60)
