"""A whole server in processes of its own, started and stopped as a user does it."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from serve.ports import bind

START_S = 120.0


@dataclass(frozen=True)
class Server:
    url: str
    data_dir: Path
    process: subprocess.Popen[bytes]
    log: Path
    metrics_port: int

    def replica_pids(self, deployment: str) -> set[int]:
        """Processes of a deployment's replicas, by the title that Ray gives them."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return {process.pid for process in family if f"ServeReplica:tandem:{deployment}" in title(process)}


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Poll a condition that lives in other processes; there is nothing to subscribe to."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.1)


def free_port() -> int:
    """Of those that the kernel gives nobody who asks for any: until its owner listens, Ray starts dozens of processes,
    each with ports of its own (its workers' are 10002 to 19999)."""
    while True:
        port = random.randrange(20_000, 32_768)
        with contextlib.suppress(OSError):
            bind("127.0.0.1", port)
            return port


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def launch(data_dir: Path, **environment: str) -> Server:
    """`tandem up` on a free port, with these settings in its environment; ready when this returns."""
    port, metrics_port = free_port(), free_port()
    log = data_dir / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve.cli", "up", "--port", str(port), "--data-dir", str(data_dir)],
            env=os.environ | {"TANDEM_METRICS__PORT": str(metrics_port)} | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", data_dir, process, log, metrics_port)
    try:
        wait_until(lambda: ready(server.url) or process.poll() is not None, START_S, "the server")
        assert process.poll() is None, log.read_text(errors="replace")
    except BaseException:
        stop(server)
        raise
    return server


def stop(server: Server) -> None:
    """SIGTERM, and the proof that nothing of it is left."""
    family = psutil.Process(server.process.pid).children(recursive=True) if server.process.poll() is None else []
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    wait_until(lambda: not any(map(running, family)), 20, "the server's processes to end")


def running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
