"""What a soak comes to: each process's growth after the caches are full, and the bars of a server that may run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from loadtest.bench.soak import SIDE, Report
from loadtest.bench.soak_trend import LEAST, PER, Trend, Verdict, second_half, trend
from loadtest.bench.soak_watch import WHOLE_SIDE, Look
from loadtest.processes import (
    CACHE_REDIS,
    CONTROLLER,
    DIFFUSION,
    ENCODER,
    GCS,
    INGRESS,
    JOB_REDIS,
    PROXY,
    RAYLET,
    ROLES,
    TANDEM,
    Use,
)
from serve.bench.bars import Bar

MEMORY_LIMIT = 64 * 1024
"""Bytes for every thousand images below which growth counts as flat, whatever its interval (`Trend.verdict`): at an
image a second, 5.5 MB a day."""
COUNT_LIMIT = 1.0
"""The same for descriptors and threads."""
BACKGROUNDS, PICTURES = 0.9, 0.85
"""Shares of the judged pictures, by size, that must show what was ordered."""
FEW = 5000
"""Images below which memory's trend is the start's: a process's first thousands of requests warm its allocator up."""
LASTING = frozenset({DIFFUSION, ENCODER, INGRESS, PROXY, CONTROLLER, GCS, RAYLET, JOB_REDIS, CACHE_REDIS, TANDEM})
"""Roles whose processes live as long as the server."""

_KIB = 1024
Process = tuple[int, float]
"""Pid and start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """One process in the steady state. `memory` is its own (`own_memory`), bytes, and `most` the largest seen in the
    whole run; `rss` and `pss` hold what is mapped of files too. A trend is None where there were too few looks."""

    pid: int
    role: str
    name: str
    memory: Trend | None
    rss: Trend | None
    pss: Trend | None
    fds: Trend | None
    threads: Trend | None
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """`steady` is the first look that counts: half of the images are drawn, and records have been swept for a while.
    `passing` are processes that were not there in all looks from then on, `replaced` those that should be there from
    start to end and are not."""

    steady: int
    processes: tuple[Growth, ...]
    passing: tuple[Use, ...]
    replaced: tuple[str, ...]
    job_redis: Trend | None
    cache_redis: Trend | None
    result_files: Trend | None


def findings(report: Report) -> Findings:
    looks = report.looks
    steady = steady_from(looks, report.plan.result_ttl_s)
    late = looks[steady:]
    there = [_processes(look) for look in late]
    always = set.intersection(*there) if there else set()
    last = {process: look.processes[process[0]] for look in looks for process in _processes(look)}
    before, after = _lasting(report.start), _lasting(looks[-1] if looks else report.start)
    return Findings(
        steady=steady,
        processes=tuple(sorted((growth(looks, late, one) for one in always), key=lambda g: (_order(g.role), g.pid))),
        passing=tuple(use for process, use in last.items() if process not in always),
        replaced=tuple(f"{use.role} {process[0]}" for process, use in before.items() if process not in after),
        job_redis=_trend(late, lambda look: look.jobs.bytes),
        cache_redis=_trend(late, lambda look: look.cache.bytes),
        result_files=_trend(late, lambda look: look.result_files),
    )


def steady_from(looks: Sequence[Look], result_ttl_s: float) -> int:
    """The later of two: half of the images are drawn; twice a record's life has passed."""
    half = second_half([look.images for look in looks])
    swept = next((index for index, look in enumerate(looks) if look.at_s >= 2 * result_ttl_s), len(looks))
    return max(half, swept)


def growth(looks: Sequence[Look], late: Sequence[Look], process: Process) -> Growth:
    pid, _ = process
    use = late[-1].processes[pid]
    return Growth(
        pid=pid,
        role=use.role,
        name=use.name,
        memory=_trend(late, lambda look: look.own_bytes[pid]),
        rss=_trend(late, lambda look: look.processes[pid].rss),
        pss=_trend(late, lambda look: look.processes[pid].pss_or_uss),
        fds=_trend(late, lambda look: look.processes[pid].fds),
        threads=_trend(late, lambda look: look.processes[pid].threads),
        most=max(look.own_bytes[pid] for look in looks if process in _processes(look)),
    )


def bars(report: Report, found: Findings) -> Iterator[Bar]:
    """Every bar. One that a run is too short for is in doubt."""
    fates, end = report.fates, report.end
    yield _none("jobs that did not succeed", fates.failed)
    yield _none("orders that became two jobs, or none", fates.doubled)
    yield _judged(report, SIDE, "background", BACKGROUNDS)
    yield _judged(report, WHOLE_SIDE, "whole picture", PICTURES)
    few = f"{fates.orders} images tell too little, {FEW} would do" if fates.orders < FEW else ""
    yield _flat("memory of every process: growth", found, "memory", MEMORY_LIMIT, few)
    yield _flat("descriptors of every process: growth", found, "fds", COUNT_LIMIT, few)
    yield _flat("threads of every process: growth", found, "threads", COUNT_LIMIT, few)
    yield _flat_one("used memory of the job Redis: growth", found.job_redis, few)
    yield _cache_redis(report, found.cache_redis, few)
    yield _none("stored files that are no pictures", sum(not one.side for one in report.judged))
    yield _none("processes that ended or were replaced", len(found.replaced))
    yield _none("records left after the sweep", end.records)
    yield _none("keys of the job Redis that were not there at the start", len(end.keys))
    yield _none("jobs with files but without a record", len(end.orphans))
    yield _none("files in the result store after the sweep", end.result_files)
    yield Bar(
        what="keys of the cache Redis after a clear",
        wanted=f"<= {report.start.cache.keys}, as at the start",
        measured=str(end.cache.keys),
        met=end.cache.keys <= report.start.cache.keys,
    )


def _none(what: str, number: int) -> Bar:
    return Bar(what=what, wanted="0", measured=str(number), met=number == 0)


def _judged(report: Report, side: int, what: str, share: float) -> Bar:
    right = [one.right for one in report.judged if one.side == side]
    return Bar(
        what=f"{side} x {side}: {what} as ordered",
        wanted=f">= {share:.0%}",
        measured=f"{sum(right)} of {len(right)}",
        met=bool(right) and sum(right) >= share * len(right),
        doubt="" if right else "no picture was judged",
    )


def _flat(what: str, found: Findings, field: str, limit: float, few: str) -> Bar:
    """Met where every process is flat. The one with the steepest line is told in any case, with its interval."""
    trends: list[tuple[Growth, Trend]] = [
        (one, each) for one in found.processes if (each := getattr(one, field)) is not None
    ]
    verdicts = [each.verdict(limit) for _, each in trends]
    grown, unsure = verdicts.count(Verdict.GROWS), verdicts.count(Verdict.DOUBT)
    unit, scale = ("KiB", _KIB) if field == "memory" else ("", 1)
    measured = ""
    if trends:
        one, each = max(
            (pair for pair, verdict in zip(trends, verdicts, strict=True) if not grown or verdict is Verdict.GROWS),
            key=lambda pair: pair[1].slope,
        )
        told = f"{grown} of {len(trends)} grow" if grown else f"{len(trends) - unsure} of {len(trends)} flat"
        measured = f"{told}, most {one.role} {one.pid}: {_slope(each, unit, scale)}"
    return Bar(
        what=what,
        wanted=f"0, or below {limit / scale:g} {unit} per {PER:,} images".replace("  ", " "),
        measured=measured,
        met=verdicts.count(Verdict.FLAT) == len(trends) > 0 and not few,
        doubt=few or _unsure(len(trends), unsure if not grown else 0),
    )


def _flat_one(what: str, each: Trend | None, few: str) -> Bar:
    verdict = each.verdict(MEMORY_LIMIT) if each else None
    return Bar(
        what=what,
        wanted=f"0, or below {MEMORY_LIMIT / _KIB:g} KiB per {PER:,} images",
        measured=_slope(each, "KiB", _KIB) if each else "",
        met=verdict is Verdict.FLAT and not few,
        doubt=few or _unsure(int(each is not None), int(verdict is Verdict.DOUBT)),
    )


def _cache_redis(report: Report, each: Trend | None, few: str) -> Bar:
    """A cache may fill up to its bound, however few the images are."""
    looks = (report.start, *report.looks)
    most, bound = max(look.cache.bytes for look in looks), max(look.cache.bound for look in looks)
    flat = _flat_one("", each, few)
    bounded = 0 < most <= bound
    return Bar(
        what="used memory of the cache Redis",
        wanted="within its maxmemory, or flat",
        measured=f"most {most / _KIB:,.0f} of {bound / _KIB:,.0f} KiB; {flat.measured}".removesuffix("; "),
        met=bounded or flat.met,
        doubt="" if bounded else flat.doubt,
    )


def _slope(each: Trend, unit: str, scale: float) -> str:
    """With its interval."""
    slope, low, high = (f"{value / scale:+.1f}" for value in (each.slope, each.low, each.high))
    return f"{slope} ({low} to {high}) {unit}".strip()


def _unsure(trends: int, unsure: int) -> str:
    if not trends:
        return f"fewer than {LEAST} looks after the caches were full"
    return f"{unsure} of {trends} go up and down too much to tell" if unsure else ""


def _trend(late: Sequence[Look], value: Callable[[Look], float]) -> Trend | None:
    return trend([look.images for look in late], [value(look) for look in late])


def _processes(look: Look) -> set[Process]:
    return {(pid, use.started_at) for pid, use in look.processes.items()}


def _lasting(look: Look) -> dict[Process, Use]:
    return {(pid, use.started_at): use for pid, use in look.processes.items() if use.role in LASTING}


def _order(role: str) -> int:
    return ROLES.index(role) if role in ROLES else len(ROLES)
