"""Pods of Ray as processes of this machine: what KubeRay and a kubelet make of the pod templates of a RayService.

A pod has an address of its own on loopback, its container's environment with the Secrets in it, and its volumes, which
are folders: a path below a mount is told as one below the folder. There is no image, no limit of memory, no second
network: `host:port` of a service is told as it is on this machine.
"""

from __future__ import annotations

import base64
import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from support.chart import Manifest, Rendered

HERE = Path(__file__).parent
KEPT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
"""Of the test's own environment; all else comes from the manifests."""
LIGHT = {
    "HF_HUB_OFFLINE": "1",
    # A pod with 8 CPUs would start 8 idle Python processes on the two cores that are really there.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",
}
_UNITS = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 1e3, "M": 1e6, "G": 1e9, "": 1.0}


def quantity(text: str) -> float:
    """Of Kubernetes, as a number: `500m` is 0.5."""
    digits, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", text).groups()  # type: ignore[union-attr]
    return float(digits) * _UNITS[unit]


@dataclass(frozen=True)
class Ground:
    """What the pods of a release stand on: a folder for their volumes, and the Secrets that are there."""

    folder: Path
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def with_secrets_of(self, release: Rendered) -> Ground:
        made = {
            each["metadata"]["name"]: {key: base64.b64decode(value).decode() for key, value in each["data"].items()}
            for each in release.of("Secret")
        }
        return Ground(self.folder, {**self.secrets, **made})

    def mounts(self, release: Rendered, spec: Mapping[str, Any], pod: str) -> dict[str, Path]:
        """Folder by the path where the container has it. Claims are shared by all pods, an `emptyDir` is the pod's."""
        found: dict[str, Path] = {}
        volumes = {each["name"]: each for each in spec["volumes"]}
        for mount in spec["containers"][0]["volumeMounts"]:
            volume, path = volumes[mount["name"]], mount["mountPath"]
            if path in ("/tmp", "/tmp/ray", "/dev/shm"):
                continue  # Ray's sockets want short paths, and its object store memory
            if "configMap" in volume:
                found[path] = self._config(release, volume["configMap"]["name"])
            else:
                found[path] = self.folder / ("claims" if "persistentVolumeClaim" in volume else pod) / mount["name"]
                found[path].mkdir(parents=True, exist_ok=True)
        return found

    def _config(self, release: Rendered, name: str) -> Path:
        folder = self.folder / "config" / name
        folder.mkdir(parents=True, exist_ok=True)
        (map_,) = (each for each in release.of("ConfigMap") if each["metadata"]["name"] == name)
        for file, text in map_["data"].items():
            (folder / file).write_text(text, encoding="utf-8")
        return folder


def told(value: Any, mounts: Mapping[str, Path]) -> Any:
    """A tree in which what begins with a mounted path begins with its folder."""
    if isinstance(value, Mapping):
        return {name: told(each, mounts) for name, each in value.items()}
    if isinstance(value, list):
        return [told(each, mounts) for each in value]
    if isinstance(value, str):
        for path, folder in mounts.items():
            if value == path or value.startswith(f"{path}/"):
                return f"{folder}{value.removeprefix(path)}"
    return value


def environment(
    container: Manifest, secrets: Mapping[str, Mapping[str, str]], mounts: Mapping[str, Path]
) -> dict[str, str]:
    """As the kubelet has it: Secrets looked up, `$(NAME)` filled in by what stands before."""
    found: dict[str, str] = {}
    for each in container["env"]:
        if "value" in each:
            value = re.sub(r"\$\((\w+)\)", lambda match: found.get(match[1], match[0]), each["value"])
        else:
            reference = each["valueFrom"]["secretKeyRef"]
            value = secrets[reference["name"]][reference["key"]]
        found[each["name"]] = told(value, mounts)
    return found


def start_params(template: Manifest, params: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, str]:
    """The arguments of `ray start` that KubeRay derives from a group: what its container asks for, and its labels."""
    resources = template["spec"]["containers"][0]["resources"]
    gpus = resources.get("limits", {}).get("nvidia.com/gpu")
    derived = {
        "num-cpus": str(math.ceil(quantity(str(resources["requests"]["cpu"])))),
        "memory": str(round(quantity(resources["limits"]["memory"]))),
        "metrics-export-port": "8080",
        "dashboard-agent-listen-port": "52365",
    }
    if gpus:
        derived["num-gpus"] = str(gpus)
    if labels:
        derived["labels"] = ",".join(f"{name}={value}" for name, value in labels.items())
    return {**derived, **params}


@dataclass
class Pod:
    """One container that runs `ray start --block`.

    Owns: its processes, all of which end with it.
    """

    name: str
    group: str
    address: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    _first: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = (sys.executable, str(HERE / "pod_init.py"), "ray", "start", "--block", *self.arguments)
        self._first = self._begin(command, stdin=subprocess.PIPE)

    def _begin(self, command: Sequence[str], stdin: int) -> subprocess.Popen[bytes]:
        own = {name: os.environ[name] for name in KEPT if name in os.environ}
        own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
        own |= LIGHT | {"PYTHONPATH": str(HERE / "pod_network"), "POD_IP": self.address} | self.environment
        with self.log.open("ab") as output:
            return subprocess.Popen(
                command, env=own, stdin=stdin, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def alive(self) -> bool:
        return self._first is not None and self._first.poll() is None

    def processes(self) -> list[psutil.Process]:
        """Without the first, which is the test's own."""
        return psutil.Process(self._first.pid).children(recursive=True) if self._first and self.alive else []

    def kill(self) -> None:
        """-9 to all that is in it."""
        if self._first is not None and self._first.stdin is not None:
            self._first.stdin.close()
            self._first.wait(30)

    def end(self, pre_stop: Sequence[str], grace_s: float) -> float:
        """As the kubelet ends it: the hook, unless it ends of itself meanwhile, then SIGTERM, then -9 once its grace is
        over. Seconds that it took."""
        assert self._first is not None
        began = time.monotonic()
        hook = self._begin(pre_stop, stdin=subprocess.DEVNULL)
        while self.alive and hook.poll() is None and time.monotonic() < began + grace_s:
            time.sleep(0.2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(hook.pid, signal.SIGKILL)
        hook.wait()
        if self.alive:
            self._first.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._first.wait(max(1.0, began + grace_s - time.monotonic()))
        took = time.monotonic() - began
        self.kill()
        return took
