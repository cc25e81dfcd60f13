"""What the processes of a server take, by what they are there for."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

DIFFUSION, ENCODER, INGRESS, PROXY, CONTROLLER = "diffusion", "encoder", "ingress", "proxy", "controller"
GCS, RAYLET, RAY_OTHER = "gcs", "raylet", "ray (other)"
JOB_REDIS, CACHE_REDIS, TANDEM, OTHER = "job redis", "cache redis", "tandem", "other"
ROLES = (
    DIFFUSION,
    ENCODER,
    INGRESS,
    PROXY,
    JOB_REDIS,
    CACHE_REDIS,
    CONTROLLER,
    GCS,
    RAYLET,
    RAY_OTHER,
    TANDEM,
    OTHER,
)
"""In the order of tables."""

ENGINE, VAE, COMPUTING, REST = "engine", "vae", "engine and vae", "the rest"
"""Threads of a process that draws. `COMPUTING` are those of the first two that no name tells apart."""

_REPLICA = re.compile(r"ray::ServeReplica:[^:]*:(\w+)")
_REPLICAS = {"Diffusion": DIFFUSION, "TextEncoder": ENCODER, "Ingress": INGRESS}
_ACTORS = {"ray::ServeController": CONTROLLER, "ray::ProxyActor": PROXY, "ray::HAProxyManager": PROXY}
_SERVERS = {"haproxy": PROXY, "gcs_server": GCS, "raylet": RAYLET}
LOOK_S = 0.5
_TASK_NICE, _TASK_CPU = 16, (11, 12)
"""Fields of /proc/PID/task/TID/stat behind the name: niceness; ticks of user and system time (proc_pid_stat(5))."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One process at one moment. `cpu_s` is since its start, user and system, its ended children's not counted.

    Memory in bytes. `pss` counts shared pages by how many share them, so that a sum over processes is right; where the
    kernel doesn't tell it, the unshared pages alone. None where nobody asked, or this user may not know. `uss` is what
    ending the process would give back. `started_at` tells a process from one that has its number later.
    """

    role: str
    cpu_s: float
    rss: int
    pss: int | None
    uss: int | None
    fds: int
    threads: int
    name: str
    started_at: float

    @property
    def pss_or_uss(self) -> int:
        """The fairest figure that there is; `rss` where there is none."""
        return self.rss if self.pss is None else self.pss


class Outside:
    """The share of the processors that neither this process nor what it started had. A context manager.

    A process that ended counts with what it had when it was last seen, `LOOK_S` before at most: who inherits its time
    may have ended too, and some are waited for by nobody. Children that left this process's tree count as others, and
    so do other guests of the host.

    Owns: the thread that looks.
    """

    def __enter__(self) -> Outside:
        self.share: float | None = None
        self._began = _busy()
        self._before = _own_times()
        self._latest = dict(self._before)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="outside", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._latest |= _own_times()
        busy, whole = (after - before for after, before in zip(_busy(), self._began, strict=True))
        self.share = max(0.0, busy - self.own_s) / whole if whole > 0 else None

    @property
    def own_s(self) -> float:
        """Seconds that this process and what it started have had so far."""
        return sum(had - self._before.get(process, 0.0) for process, had in self._latest.items())

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_S):
            self._latest |= _own_times()


def _own_times() -> dict[tuple[int, float], float]:
    """Seconds that each process of this one's tree has had, by its number and when it began."""
    found, this = {}, psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            found[process.pid, process.create_time()] = times.user + times.system
    return found


def _busy() -> tuple[float, float]:
    """Seconds that the processors worked, and those that there were. Linux counts a guest's time in the host's too."""
    times = psutil.cpu_times()
    whole = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return whole - times.idle - getattr(times, "iowait", 0.0), whole


def usage(root: psutil.Process, *, memory: bool = True) -> dict[int, Use]:
    """All processes of the tree at `root`, by pid. One that ends meanwhile is left out.

    `memory` False leaves `pss` and `uss` out: to count pages, the kernel keeps the process from mapping memory for
    some milliseconds.
    """
    found = {}
    for process in _tree(root):
        with contextlib.suppress(psutil.Error, OSError):
            found[process.pid] = _use(process, memory)
    return found


def spent(before: Mapping[int, Use], after: Mapping[int, Use]) -> dict[str, float]:
    """CPU seconds between two moments, by role; what is in neither look (a process that came and went) is not seen,
    nor the last part of one that ended. A role without any process in `after` is not there."""
    seconds: dict[str, float] = defaultdict(float)
    for pid, use in after.items():
        earlier = before.get(pid)
        known = earlier is not None and earlier.started_at == use.started_at
        seconds[use.role] += use.cpu_s - (earlier.cpu_s if known and earlier is not None else 0.0)
    return dict(seconds)


def role_of(command: Sequence[str], name: str, folder: str = "") -> str:
    """`command` are the words of the command line, `name` the executable's, `folder` where it works: of a Redis, where
    its files lie."""
    title = command[0].strip() if command else ""
    if replica := _REPLICA.match(title):
        return next((role for start, role in _REPLICAS.items() if replica[1].startswith(start)), OTHER)
    for start, role in _ACTORS.items():
        if title.startswith(start):
            return role
    if name in _SERVERS:
        return _SERVERS[name]
    if name.startswith("redis-server"):
        return CACHE_REDIS if Path(folder).name == "cache" else JOB_REDIS
    if title.startswith("ray::") or any("/ray/" in word and word.endswith(".py") for word in command[1:4]):
        return RAY_OTHER
    if "up" in command and ("serve.cli" in command or any(Path(word).name == "tandem" for word in command[:2])):
        return TANDEM
    return OTHER


def thread_seconds(pid: int) -> dict[str, float]:
    """CPU seconds of a drawing process' threads so far: engine, vae, the rest.

    A CPU's denoiser computes on threads that are nicer than the process' first one, and so do the threads that torch
    starts from these; they go by their name where they have one that says which. Without nice threads all is the rest.
    Empty where the system doesn't tell. Threads that have ended are lost.
    """
    seconds: dict[str, float] = defaultdict(float)
    usual = psutil.Process(pid).nice() if Path(f"/proc/{pid}/task").is_dir() else 0
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            head, _, tail = task.read_text(errors="replace").rpartition(")")
            fields = tail.split()
            name, nice = head.partition("(")[2], int(fields[_TASK_NICE])
            group = name if name in (ENGINE, VAE) else COMPUTING if nice > usual else REST
            seconds[group] += sum(int(fields[field]) for field in _TASK_CPU) / os.sysconf("SC_CLK_TCK")
    return dict(seconds)


def by_role(uses: Mapping[int, Use], role: str) -> dict[int, Use]:
    return {pid: use for pid, use in uses.items() if use.role == role}


def _tree(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _use(process: psutil.Process, memory: bool) -> Use:
    with process.oneshot():
        cpu, rss, pss, uss = process.cpu_times(), process.memory_info().rss, None, None
        name, command = process.name(), process.cmdline()
        folder = _folder(process) if name.startswith("redis-server") else ""
        if memory:
            with contextlib.suppress(psutil.AccessDenied):
                full = process.memory_full_info()
                uss = full.uss
                pss = getattr(full, "pss", full.uss)
        return Use(
            role=role_of(command, name, folder),
            cpu_s=cpu.user + cpu.system,
            rss=rss,
            pss=pss,
            uss=uss,
            fds=process.num_fds() if hasattr(process, "num_fds") else 0,
            threads=process.num_threads(),
            name=_title(command, name),
            started_at=process.create_time(),
        )


def _title(command: Sequence[str], name: str) -> str:
    """What tells it from the others: a title of its own, a script's file, else the executable."""
    title = command[0].strip() if command else ""
    if title.startswith("ray::"):
        return re.sub(r"\.\w+$", "", title)  # what an actor is at
    scripts = [Path(word).name for word in command[1:4] if word.endswith(".py")]
    return scripts[0] if scripts else name


def _folder(process: psutil.Process) -> str:
    try:
        return process.cwd()
    except psutil.AccessDenied:
        return ""
