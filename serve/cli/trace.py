"""`tandem trace`: where the time of jobs went, stage by stage."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.cli.client import Client
from serve.cli.trace_screen import shown_means, shown_trace
from serve.client import Job
from serve.domain.jobs import JobState, Timings
from serve.errors import OperatorError
from serve.stages import STAGES, explained, stages, wall_s

_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One stage on the job's time line, in seconds after the order's arrival."""

    stage: str
    starts_s: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A job's stages as far as they are known. `wall_s` and `explained` are None before its end. `gap` is what lies in
    no stage, before `told`: None where the stages hold it all. `ahead` was beside the stages."""

    job: Job
    timings: Timings
    bars: tuple[Bar, ...]
    ahead: Bar | None
    wall_s: float | None
    explained: float | None
    gap: Bar | None

    @classmethod
    def of(cls, job: Job) -> Trace:
        timings = job.timings
        wall, told = wall_s(timings), stages(timings)
        bars: list[Bar] = []
        end = 0.0
        for stage, seconds in told:
            if stage == "told" and wall is not None:
                end = max(end, wall - seconds)
            bars.append(Bar(stage=stage, starts_s=end, seconds=seconds))
            end += seconds
        ahead, gap = None, None
        if timings.ahead_s is not None:
            ahead = Bar(stage="ahead", starts_s=timings.admission_s or 0.0, seconds=timings.ahead_s)
        missing = (wall or 0.0) - sum(seconds for _, seconds in told)
        if wall is not None and missing > 0:
            before = sum(seconds for stage, seconds in told if stage != "told")
            gap = Bar(stage="in no stage", starts_s=before, seconds=missing)
        return cls(
            job=job,
            timings=timings,
            bars=tuple(bars),
            ahead=ahead,
            wall_s=wall,
            explained=explained(timings),
            gap=gap,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """One stage of several jobs: how many went through it, its mean over all of them in seconds, and its longest."""

    stage: str
    jobs: int
    mean_s: float
    worst_s: float


async def trace(client: Client, ids: Sequence[str], last: int | None, *, as_json: bool) -> int:
    """The stages of one job, or the means of several: those that are named, or the `last` that succeeded."""
    _check(ids, last)
    async with client:
        if last is None:
            jobs = [await client.get(each) for each in ids]
        else:
            jobs = [job async for job in client.jobs([JobState.SUCCEEDED], last)]
    traces = [Trace.of(job) for job in jobs]
    if as_json:
        told = [_as_json(each) for each in traces]
        print(json.dumps(told[0] if len(ids) == 1 else _several(told, traces), indent=2))
    elif len(ids) == 1:
        shown_trace(traces[0])
    else:
        ended = [each for each in traces if each.wall_s is not None]
        shown_means(ended, means(ended), len(traces) - len(ended))
    return 0


def means(traces: Sequence[Trace]) -> list[Mean]:
    """Of the stages that any of the jobs went through, in their order."""
    found = []
    for stage in STAGES:
        seconds = [bar.seconds for each in traces for bar in each.bars if bar.stage == stage]
        if seconds:
            mean_s = sum(seconds) / len(traces)
            found.append(Mean(stage=stage, jobs=len(seconds), mean_s=mean_s, worst_s=max(seconds)))
    return found


def _check(ids: Sequence[str], last: int | None) -> None:
    if (last is None) is not bool(ids):
        raise OperatorError("trace: name jobs by their ids, or say --last N", "job")
    for each in ids:
        if not _ID.fullmatch(each):
            raise OperatorError(f"trace {each}: a job's id has 32 hex digits", "job")


def _as_json(one: Trace) -> dict[str, Any]:
    """Seconds everywhere; what is not known is null."""
    job, timings = one.job, one.timings
    return {
        "id": job.id,
        "state": JobState(job.state).value,
        "attempt": job.attempt,
        "stages": [{"stage": bar.stage, "starts_s": bar.starts_s, "seconds": bar.seconds} for bar in one.bars],
        "wall_s": one.wall_s,
        "explained": one.explained,
        "unexplained_s": None if one.wall_s is None else one.gap.seconds if one.gap else 0.0,
        "text_from": timings.text_from,
        "ahead_s": timings.ahead_s,
        "batch_images": timings.batch_images,
        "cache": job.raw.get("cache"),
    }


def _several(told: Sequence[dict[str, Any]], traces: Sequence[Trace]) -> dict[str, Any]:
    ended = [each for each in traces if each.wall_s is not None]
    wall = sum(each.wall_s or 0.0 for each in ended)
    unexplained = sum(each.gap.seconds for each in ended if each.gap)
    return {
        "ended": len(ended),
        "mean_s": {each.stage: each.mean_s for each in means(ended)},
        "mean_wall_s": wall / len(ended) if ended else None,
        "explained": 1 - unexplained / wall if wall else None,
        "jobs": told,
    }
