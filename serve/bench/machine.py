"""The machine that is measured, and how fast it multiplies matrices: the limit that no encoder passes."""

from __future__ import annotations

import math
import os
import platform
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Self

import psutil
import torch
from torch.nn import functional

_LEAST_RUNS = 3
_TICKS_S = 0.03
"""Less than this of other processes' time is lost in what the kernel's clock of 10 ms rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """`cores` are those that this process may use, `threads` those that torch computes with. `gpu` is None without."""

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    python: str
    torch: str
    threads: int
    gpu: str | None


def this_machine() -> Machine:
    return Machine(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


class OtherWork:
    """The share of the processors that others took while this process measured: it makes every figure worse.

    A context manager, to be entered as often as one measures. What waits for a turn is not seen: only what ran.
    """

    def __init__(self) -> None:
        self._theirs = 0.0
        self._all = 0.0

    def __enter__(self) -> Self:
        self._before = _cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        theirs, whole = (after - before for after, before in zip(_cpu_seconds(), self._before, strict=True))
        self._theirs += theirs
        self._all += whole

    @property
    def share(self) -> float | None:
        """None where nothing was measured."""
        if not self._all:
            return None
        return self._theirs / self._all if self._theirs > _TICKS_S else 0.0


class Peaks:
    """The fastest matrix products that were seen on one device, by dtype, in floating-point operations a second.

    They bound from above what an encoder of that dtype can reach: its products are smaller, and not all that it does.
    Whatever else runs on the machine can only lower what is seen, so that every look counts.
    """

    def __init__(self, device: str, look_s: float) -> None:
        """`look_s` seconds for each size of matrix."""
        self._device = device
        self._look_s = look_s
        self._best: dict[str, float] = {}

    def best(self, dtype: str) -> float:
        """As seen so far; looks if nobody has."""
        return self._best.get(dtype) or self.look(dtype)

    def look(self, dtype: str) -> float:
        """Multiply for a while, then say the best so far. torch's threads are used as they are."""
        seen = max(_product_rate(side, self._device, dtype, self._look_s) for side in _sides(self._device))
        self._best[dtype] = max(seen, self._best.get(dtype, 0.0))
        return self._best[dtype]


def synchronize(device: str) -> None:
    """Wait for the device. Kernels on a GPU are only queued when a call returns."""
    if device != "cpu":
        getattr(torch, device).synchronize()


@torch.inference_mode()
def _product_rate(side: int, device: str, dtype: str, seconds: float) -> float:
    """The best of several products of two square matrices, as a linear layer multiplies them."""
    left, right = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    best = math.inf
    started = time.perf_counter()
    for run in count():
        began = time.perf_counter()
        functional.linear(left, right)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
        if run >= _LEAST_RUNS and time.perf_counter() - started > seconds:
            return 2 * side**3 / best
    raise AssertionError


def _cpu_seconds() -> tuple[float, float]:
    """Since the machine's start: seconds of its processors in other processes (and in other guests of its host), and
    all that they had."""
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    unused = times.idle + getattr(times, "iowait", 0.0)
    # Linux counts a guest's time in the host's user time too.
    whole = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return whole - unused - own.user - own.system, whole


def _sides(device: str) -> tuple[int, ...]:
    return (256, 512, 1024) if device == "cpu" else (2048, 4096, 8192)


def _cpu_name() -> str:
    """The name in /proc/cpuinfo, where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
