"""This machine: ports, open files, shared memory, the folder for temporary files."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from serve.doctor.findings import Finding, fault, ok, warning
from serve.errors import OperatorError
from serve.ports import bind, check_port
from serve.settings.tree import Settings

LEAST_FILES = 8192
"""What Ray recommends; below half of it connections fail under load."""
RAISED_FILES = 65_536
"""Ray raises its processes' own limit to that, as far as the hard limit lets it."""
LEAST_SHM_BYTES = 1 << 30
SHM = Path("/dev/shm")
FULL_DISK = 0.95
"""Share of the disk under Ray's folder from which on Ray starts no more work there."""
_HAPROXY = (("RAY_SERVE_HAPROXY_STATS_PORT", 8404), ("RAY_SERVE_HAPROXY_METRICS_PORT", 9101))


def check_machine(settings: Settings, *, serving: bool) -> list[Finding]:
    """`serving`: a server of ours answers where this one would, so that its ports are taken as they should."""
    found = list(_ports(settings, serving=serving))
    found += _files(settings)
    found += _shared_memory()
    found += _temporary()
    return found


def _ports(settings: Settings, *, serving: bool) -> Iterator[Finding]:
    host, port = settings.http.host, settings.http.port
    if serving:
        yield ok("ports", "http.port", f"{host}:{port} is the running server's")
        return
    try:
        check_port(host, port)
    except OperatorError as error:
        setting = error.param or "http.port"
        told = error.message.removeprefix(f"{setting}: ")
        yield fault("port-taken", setting, told, "another port or host, or end what listens there (`ss -ltnp`)")
    else:
        yield ok("ports", "http.port", f"{host}:{port} is free")
    others = [("metrics.port", settings.metrics.port)]
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        said = [(variable, os.environ.get(variable, str(usual))) for variable, usual in _HAPROXY]
        others += [(variable, int(port)) for variable, port in said if port.isdecimal()]
    for name, number in others:
        try:
            if number is not None:
                bind("127.0.0.1" if name == "metrics.port" else "0.0.0.0", number)
        except OSError as error:
            told = f"{number}: {error.strerror}"
            yield fault("port-taken", name, told, "another port, or end what listens there (`ss -ltnp`)")


def _files(settings: Settings) -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = RAISED_FILES if hard == resource.RLIM_INFINITY else min(hard, RAISED_FILES)
    cure = f"ulimit -Hn {RAISED_FILES}, or LimitNOFILE of the service"
    if most < settings.http.max_connections + LEAST_FILES // 8:
        told = f"{most} open files are allowed, too few for http.max_connections {settings.http.max_connections}"
        yield fault("open-files", "http.max_connections", told, f"{cure}; or fewer connections")
    elif most < LEAST_FILES:
        yield warning("open-files", "http.max_connections", f"only {most} open files are allowed", cure)
    else:
        yield ok("open-files", "http.max_connections", f"{most} open files are allowed")


def _shared_memory() -> Iterator[Finding]:
    """Ray keeps its object store there, or else, slowly, on the disk. Only Linux has it."""
    if not SHM.is_dir():
        return
    free = shutil.disk_usage(SHM).free
    told = f"{SHM} has {free / 2**20:.0f} MiB left"
    if free < LEAST_SHM_BYTES:
        cure = "docker run --shm-size=4g; in a pod an emptyDir with medium: Memory on /dev/shm (the chart has one)"
        yield warning("shared-memory", "/dev/shm", f"{told}: Ray's object store goes to the disk", cure)
    else:
        yield ok("shared-memory", "/dev/shm", told)


def _temporary() -> Iterator[Finding]:
    try:
        folder = tempfile.gettempdir()
        usage = shutil.disk_usage(folder)
    except OSError:
        cure = "make /tmp writable, or set TMPDIR"
        yield fault("temporary-none", "TMPDIR", "no folder for temporary files can be written", cure)
        return
    if usage.used / (usage.used + usage.free) > FULL_DISK:
        told = f"{folder}, where Ray keeps its sessions, has {usage.free / 1e9:.1f} of {usage.total / 1e9:.0f} GB left"
        yield warning("temporary-full", "TMPDIR", f"{told}: Ray spills nothing there", "make room, or set TMPDIR")
