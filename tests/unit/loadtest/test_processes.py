"""Real processes under the titles that Ray, Serve and Redis give theirs."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support.server import wait_until

from loadtest import processes
from loadtest.processes import Outside, by_role, role_of, spent, thread_seconds, usage
from serve.embedded import EmbeddedRedis

WAIT = "import sys; sys.stdin.read()"
BURN = "import sys, time\nwhile time.process_time() < {seconds}: pass\nprint('burnt', flush=True)\nsys.stdin.read()"

Spawn = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    children: list[subprocess.Popen[str]] = []

    def begin(title: str, *words: str, executable: str | None = None) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [title, *words],
            executable=executable or sys.executable,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child

    yield begin
    for child in children:
        child.kill()
        child.communicate()


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("ray::ServeReplica:tandem:Diffusion-shapes", "diffusion"),
        ("ray::ServeReplica:tandem:TextEncoder-clip-128x2.encode", "encoder"),
        ("ray::ServeReplica:tandem:Ingress", "ingress"),
        ("ray::ServeReplica:default:Pipeline", "other"),
        ("ray::ServeController.listen_for_change", "controller"),
        ("ray::ProxyActor", "proxy"),
        ("ray::IDLE", "ray (other)"),
        ("ray::DashboardAgent", "ray (other)"),
        ("python", "other"),
    ],
)
def test_a_process_is_known_by_its_title(spawn: Spawn, title: str, role: str) -> None:
    child = spawn(title, "-c", WAIT)
    use = usage(psutil.Process())[child.pid]
    assert use.role == role
    assert use.rss > 0
    assert use.threads == 1
    assert use.fds >= 3


@pytest.mark.parametrize(("name", "role"), [("raylet", "raylet"), ("gcs_server", "gcs"), ("haproxy", "proxy")])
def test_a_server_is_known_by_its_executable(spawn: Spawn, tmp_path: Path, name: str, role: str) -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    (tmp_path / name).symlink_to(sleep)
    child = spawn(f"/opt/{name}", "60", executable=str(tmp_path / name))
    assert usage(psutil.Process(child.pid))[child.pid].role == role


def test_the_two_redis_servers_are_told_apart(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path, "jobs") as jobs, EmbeddedRedis(tmp_path, "cache") as cache:
        uses = usage(psutil.Process())
        assert jobs.pid is not None
        assert cache.pid is not None
        assert uses[jobs.pid].role == "job redis"
        assert uses[cache.pid].role == "cache redis"


def test_the_server_itself_and_what_only_looks_like_it() -> None:
    up = ["/usr/bin/python3", "-m", "serve.cli", "up", "--port", "8000"]
    assert role_of(up, "python3") == "tandem"
    assert role_of(["/usr/bin/python3", "/usr/bin/tandem", "up"], "tandem") == "tandem"
    assert role_of(["/usr/bin/python3", "/usr/bin/tandem", "bench", "service"], "tandem") == "other"
    assert role_of(["vim", "up"], "vim") == "other"
    assert role_of(["python", "-u", "/lib/site-packages/ray/_private/log_monitor.py"], "python") == "ray (other)"


def test_what_a_role_spent_is_what_its_processes_did(spawn: Spawn) -> None:
    idle = spawn("ray::ProxyActor", "-c", WAIT)
    before = usage(psutil.Process(), memory=False)
    assert before[idle.pid].pss is None
    busy = spawn("ray::ServeReplica:tandem:Diffusion-shapes", "-c", BURN.format(seconds=0.3))
    assert busy.stdout is not None
    assert busy.stdout.readline() == "burnt\n"
    seconds = spent(before, usage(psutil.Process(), memory=False))
    assert 0.25 <= seconds["diffusion"] < 1.0  # it began meanwhile: all of it counts
    assert seconds["proxy"] < 0.2


def test_a_process_that_has_anothers_number_is_not_taken_for_it(spawn: Spawn) -> None:
    child = spawn("ray::ProxyActor", "-c", BURN.format(seconds=0.1))
    assert child.stdout is not None
    child.stdout.readline()
    (now,) = by_role(usage(psutil.Process(child.pid)), "proxy").values()
    earlier = replace(now, cpu_s=100.0, started_at=now.started_at - 10)
    assert spent({child.pid: earlier}, {child.pid: now})["proxy"] == now.cpu_s
    assert spent({child.pid: now}, {}) == {}


def test_a_tree_that_has_ended_has_no_processes(spawn: Spawn) -> None:
    child = spawn("ray::IDLE", "-c", "")
    gone = psutil.Process(child.pid)
    child.wait()
    assert usage(gone) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="threads of a process are nice on Linux alone")
def test_nice_threads_are_those_that_compute() -> None:
    stop = threading.Event()

    def burn(niceness: int, name: str | None) -> None:
        if niceness:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.nice(0) + niceness)
        if name is not None:
            Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
        until = time.thread_time() + 0.1
        while time.thread_time() < until:
            pass
        stop.wait(30)

    before = thread_seconds(os.getpid())
    threads = [threading.Thread(target=burn, args=each) for each in ((5, None), (0, "vae"), (0, None))]
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + 20
        wanted = (processes.COMPUTING, processes.VAE)
        while time.monotonic() < deadline:
            after = thread_seconds(os.getpid())
            grown = {name: after[name] - before.get(name, 0.0) for name in after}
            if all(grown.get(name, 0.0) >= 0.08 for name in (*wanted, processes.REST)):
                break
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert all(0.08 <= grown[name] < 0.2 for name in wanted)
    assert grown[processes.REST] >= 0.08
    assert processes.ENGINE not in grown


def test_ones_own_children_are_no_others(spawn: Spawn) -> None:
    """What they had counts after their end, though nobody tells it any more."""
    with Outside() as outside:
        busy = spawn("python", "-c", BURN.format(seconds=0.5))
        assert busy.stdout is not None
        busy.stdout.readline()
        wait_until(lambda: outside.own_s >= 0.45, 10, "a look at the child")
        busy.communicate()
    assert outside.own_s >= 0.45
    assert outside.share is not None
    assert 0 <= outside.share <= 1
