"""How long a server takes to start, by phase, and what its processes hold in memory."""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from loadtest.processes import CONTROLLER, DIFFUSION, GCS, JOB_REDIS, ROLES, TANDEM, Use
from serve.bench.stats import Spread

READY, FIRST_IMAGE = "ready", "first image"
_READY_LINE = re.compile(r"(\d{4}-\d\d-\d\dT[\d:.]+Z) INFO serve\.local ready at ")
_PROFILE_LINE = re.compile(r"serve\.diffusion\.profiling measured steps of \S+ in ([\d.]+) s")
_TOLD_S, _POLL_S = 10.0, 0.1
_MARKS = (JOB_REDIS, GCS, CONTROLLER, DIFFUSION)
_PHASES = {
    JOB_REDIS: "imports, settings, model files",
    GCS: "Redis, Ray's import",
    CONTROLLER: "Ray's own servers",
    DIFFUSION: "Serve, the graph",
    READY: "replicas: imports, weights, profile",
    FIRST_IMAGE: "to the first image",
}
"""What happens until a process of that role is there, or the line is told, from the mark before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start: seconds from the first process' beginning. `phases` follow one another and end at the first image.
    `ready_s` is when the log says so, None without a line: Serve looks once a second whether all replicas are there, so
    that the first image may be there before. `profile_s` is the part in which steps were measured, None where they were
    known."""

    phases: Mapping[str, float]
    ready_s: float | None
    first_image_s: float
    profile_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Starts:
    """Over several starts, each on a data_dir of its own; the phases are medians."""

    ready: Spread | None
    first_image: Spread
    profile: Spread | None
    phases: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of all processes of one role and name, bytes. `pss` is what a sum may be made of; `uss` what is shared with
    nobody. None where the system doesn't tell."""

    role: str
    name: str
    processes: int
    rss: int
    pss: int | None
    uss: int | None
    fds: int
    threads: int


def read_start(uses: Mapping[int, Use], log: str, first_image_at: float) -> Start:
    """`uses` are the processes after the start, `log` the server's, `first_image_at` in Unix seconds. Raises ValueError
    without the server's first process."""
    began = min((use.started_at for use in uses.values() if use.role == TANDEM), default=None)
    if began is None:
        raise ValueError("no process of the server")
    told = _READY_LINE.search(log)
    ready_s = datetime.fromisoformat(told[1]).timestamp() - began if told else None
    marks = {}
    for role in _MARKS:
        times = [use.started_at for use in uses.values() if use.role == role]
        if times:
            marks[role] = min(times) - began
    if ready_s is not None and ready_s <= first_image_at - began:
        marks[READY] = ready_s
    marks[FIRST_IMAGE] = first_image_at - began
    phases, last = dict[str, float](), 0.0
    for mark in _PHASES:
        if mark in marks:
            phases[_PHASES[mark]] = max(0.0, marks[mark] - last)
            last = max(last, marks[mark])
    profile = _PROFILE_LINE.search(log)
    return Start(
        phases=phases,
        ready_s=ready_s,
        first_image_s=first_image_at - began,
        profile_s=float(profile[1]) if profile else None,
    )


def starts_of(starts: Sequence[Start]) -> Starts:
    """Raises ValueError for none."""
    phases: dict[str, list[float]] = defaultdict(list)
    for one in starts:
        for name, seconds in one.phases.items():
            phases[name].append(seconds)
    ready = [one.ready_s for one in starts if one.ready_s is not None]
    profile = [one.profile_s for one in starts if one.profile_s is not None]
    return Starts(
        ready=Spread.of(ready) if ready else None,
        first_image=Spread.of([one.first_image_s for one in starts]),
        profile=Spread.of(profile) if profile else None,
        phases={name: Spread.of(values).median for name, values in phases.items()},
    )


def memory_of(uses: Mapping[int, Use]) -> tuple[Memory, ...]:
    """By role, in the order of `ROLES`, and by name."""
    groups: dict[tuple[int, str], list[Use]] = defaultdict(list)
    for use in uses.values():
        groups[ROLES.index(use.role), use.name].append(use)
    return tuple(_memory(groups[key]) for key in sorted(groups))


def _memory(own: Sequence[Use]) -> Memory:
    return Memory(
        role=own[0].role,
        name=own[0].name,
        processes=len(own),
        rss=sum(use.rss for use in own),
        pss=_sum([use.pss for use in own]),
        uss=_sum([use.uss for use in own]),
        fds=sum(use.fds for use in own),
        threads=sum(use.threads for use in own),
    )


def _sum(values: Sequence[int | None]) -> int | None:
    """None where one of them is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


async def told_ready(data_dir: Path) -> str:
    """What a server of `loadtest.servers` has said when it says that it is ready; after some seconds, whatever it has
    said."""
    deadline = time.monotonic() + _TOLD_S
    while True:
        log = _log_of(data_dir)
        if _READY_LINE.search(log) or time.monotonic() > deadline:
            return log
        await asyncio.sleep(_POLL_S)


def _log_of(data_dir: Path) -> str:
    """Empty where it lies elsewhere."""
    try:
        return (data_dir.parent / "server.log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
