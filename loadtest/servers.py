"""Tandem and the baselines, each started as its users start it, on the same cores, and ended again."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from loadtest.family import Family
from serve.errors import OperatorError
from serve.settings.tree import ENV_PREFIX

log = logging.getLogger(__name__)

TANDEM = "tandem"
BASELINES: Mapping[str, str] = {
    "lock": "loadtest.baselines.lock",
    "celery": "loadtest.baselines.celery_stack",
    "litserve": "loadtest.baselines.litserve_app",
    "ray-batch": "loadtest.baselines.ray_batch",
}
"""By name, the module that is the server's command."""
NAMES = (TANDEM, *BASELINES)
START_S = 300.0
"""Longest wait for the first picture."""
WARM_UP: Mapping[str, Any] = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1}
"""The picture that shows that a server is ready."""
_POLL_S = 0.1
_DIALECTS = {TANDEM: "wait", "celery": "imagen"}
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_NOT_READY = (404, 502, 503)
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a server may use: the cores that all its processes are pinned to, and the threads of torch of its denoiser.

    The cores are the limit that is equal for all. Beside those threads, Tandem's text encoder has some of its own, and
    so have its VAE's operators; a baseline's OMP and MKL have `torch_threads` for all that its process does.
    """

    cores: tuple[int, ...]
    torch_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A server that has drawn a picture. `dialect` is a name in `loadtest.sender.users.DIALECTS`; all its processes
    descend from `root`; `data_dir` has its files, for Tandem what its setting means. `metrics_url` is its Prometheus
    page, None for a server without."""

    name: str
    url: str
    dialect: str
    root: psutil.Process
    data_dir: Path
    metrics_url: str | None


@asynccontextmanager
async def serving(
    name: str,
    *,
    budget: Budget,
    settings: Mapping[str, Any] | None = None,
    model: str = "shapes",
    options: Sequence[str] = (),
    data_dir: Path | None = None,
) -> AsyncIterator[Serving]:
    """The server of that name, one of `NAMES`, on a free port; ended, with all that it started, when it is left.

    `settings` are Tandem's, in groups as in settings.yaml; `options` are more words of a baseline's command line;
    `data_dir` is Tandem's where one start is to find what another left, else a new one that is removed. The operator's
    own TANDEM_* environment plays no part. Raises OperatorError where it does not start; the end of its log is logged
    then.
    """
    _check(name, budget, settings or {}, options)
    with tempfile.TemporaryDirectory(prefix="tl-", ignore_cleanup_errors=True) as scratch:  # short: sockets lie in it
        folder = Path(scratch)
        data = data_dir or folder / "data"
        port, metrics_port = _free_ports(2)
        if name == TANDEM:
            command = _tandem(folder, data, port, metrics_port, model, budget, settings or {})
        else:
            command = ["-m", BASELINES[name], "--model", _absolute(model), "--port", str(port)]
            command += ["--torch-threads", str(budget.torch_threads), *options]
        family = Family(
            [sys.executable, *command],
            log=folder / "server.log",
            environ=_environment(name, budget, folder),
            cores=budget.cores,
        )
        with family:
            url, dialect = f"http://{_LOOPBACK}:{port}", _DIALECTS.get(name, "generate")
            await _first_picture(name, url, dialect, family)
            yield Serving(
                name=name,
                url=url,
                dialect=dialect,
                root=family.root,
                data_dir=data if name == TANDEM else folder,
                metrics_url=f"http://{_LOOPBACK}:{metrics_port}/metrics" if name == TANDEM else None,
            )


def _check(name: str, budget: Budget, settings: Mapping[str, Any], options: Sequence[str]) -> None:
    if name not in NAMES:
        raise OperatorError(f"server {name!r} is not one of {', '.join(NAMES)}")
    if settings and name != TANDEM:
        raise OperatorError(f"settings are Tandem's; {name} has none")
    if options and name == TANDEM:
        raise OperatorError("options are the baselines'; Tandem has settings")
    here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    if not budget.cores or (absent := sorted(set(budget.cores) - here)):
        named = ", ".join(map(str, absent)) if budget.cores else "none"
        raise OperatorError(f"cores: {named} named, this process may use {', '.join(map(str, sorted(here)))}")
    if budget.torch_threads < 1:
        raise OperatorError(f"torch threads: {budget.torch_threads} is less than 1")


def _tandem(
    folder: Path,
    data_dir: Path,
    port: int,
    metrics_port: int,
    model: str,
    budget: Budget,
    settings: Mapping[str, Any],
) -> list[str]:
    """The command, and the settings file that it reads: what the budget says, under what the caller says."""
    diffusion = {"torch_threads": budget.torch_threads, **settings.get("diffusion", {})}
    metrics = {**settings.get("metrics", {}), "port": metrics_port}
    file = folder / "settings.yaml"
    # JSON is YAML; a password is no option.
    file.write_text(json.dumps({**settings, "diffusion": diffusion, "metrics": metrics}), encoding="utf-8")
    options = {"--config": file, "--model": _absolute(model), "--data-dir": data_dir, "--port": port}
    words = [str(word) for option in options.items() for word in option]
    return ["-m", "serve.cli", "up", "--host", _LOOPBACK, *words]


def _absolute(model: str) -> str:
    """The server runs in a folder of its own."""
    place = Path(model).expanduser()
    return str(place.resolve()) if model != "shapes" and place.exists() else model


def _environment(name: str, budget: Budget, folder: Path) -> dict[str, str]:
    """Nothing of the operator's that would make this server another one; and nothing is downloaded."""
    environ = {
        variable: value
        for variable, value in os.environ.items()
        if not variable.upper().startswith(ENV_PREFIX) and variable not in (*_THREADS, "RAY_ADDRESS", "REDIS_URL")
    }
    environ |= {"TMPDIR": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    # Tandem's processes have threads of their own each, as its settings say.
    return environ if name == TANDEM else environ | dict.fromkeys(_THREADS, str(budget.torch_threads))


async def _first_picture(name: str, url: str, dialect: str, family: Family) -> None:
    """Returns when the server has drawn one. Raises OperatorError."""
    deadline = time.monotonic() + START_S
    async with httpx.AsyncClient(base_url=url, timeout=START_S, trust_env=False) as client:
        while family.code is None and time.monotonic() < deadline:
            try:
                response = await _DRAW[dialect](client)
            except httpx.TransportError as error:
                answer = repr(error)
            else:
                if response.status_code == 200 and response.headers["content-type"].startswith("image/"):
                    return
                answer = f"{response.status_code} {response.text[:200]}"
                if response.status_code not in _NOT_READY:
                    break
            await asyncio.sleep(_POLL_S)
        else:
            answer = f"nothing in {START_S:.0f} s"
    words = family.last_words()
    log.error("the end of the log of %s:\n%s", name, words)
    if family.code is not None:
        answer = f"exit code {family.code}: {words.splitlines()[-1].removeprefix('tandem: ')}"
    raise OperatorError(f"{name} does not start: {answer}")


async def _at_once(client: httpx.AsyncClient) -> httpx.Response:
    return await client.post("/generate", json=dict(WARM_UP))


async def _imagen(client: httpx.AsyncClient) -> httpx.Response:
    queued = await client.post("/generate", json=dict(WARM_UP))
    if queued.status_code != 202:
        return queued
    while True:
        told = (await client.get(f"/status/{queued.json()['job_id']}")).raise_for_status()
        status = told.json()
        if status["status"] == "SUCCESS":
            return await client.get(status["result"]["url"])
        if status["status"] == "FAILURE":
            return httpx.Response(500, text=told.text)
        await asyncio.sleep(_POLL_S)


async def _waited_for(client: httpx.AsyncClient) -> httpx.Response:
    ready = await client.get("/readyz")
    if ready.status_code != 200:
        return ready
    job = await client.post("/v1/jobs", params={"wait": "true"}, json=dict(WARM_UP))
    if job.status_code != 200 or job.json()["state"] != "succeeded":
        return job if job.status_code != 200 else httpx.Response(500, text=job.text)
    return await client.get(job.json()["images"][0]["url"])


_DRAW: Mapping[str, Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]] = {
    "generate": _at_once,
    "imagen": _imagen,
    "wait": _waited_for,
}


def _free_ports(number: int) -> list[int]:
    """Ports that are free now, none of them twice."""
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind((_LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
