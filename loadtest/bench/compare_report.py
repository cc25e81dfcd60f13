"""The comparison as tables for people and as JSON for machines, with the bars that it is held against."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from loadtest.bench.compare_bars import bars, p50, p99, range_text, ratio_text
from loadtest.bench.compare_load import CLIENT
from loadtest.bench.compare_plan import LEAD_S, SETTLE_S, Report
from loadtest.bench.compare_ratios import Held, Ratio, Record, ratios
from loadtest.bench.compare_work import Window
from loadtest.processes import ROLES
from loadtest.servers import TANDEM
from serve.bench.bars import Bar
from serve.bench.report import flat, plain_table, spread_text
from serve.bench.stats import Spread

_GB = 1e9


def as_json(report: Report, held: Sequence[Held] = ()) -> dict[str, Any]:
    told = asdict(report)
    told["plan"]["sections"] = sorted(report.plan.sections)
    told |= {
        "best_threads": {name: report.threads(name) for name in report.plan.servers},
        "capacity": {name: report.capacity(name) for name in report.plan.servers},
        "ratios": {one.name: asdict(one.value) for one in ratios(report)},
        "bars": [asdict(bar) for bar in bars(report)],
        "check": [
            {"ratio": one.ratio.name, "recorded": one.recorded.model_dump(mode="json"), "worse": one.worse}
            for one in held
        ],
        "other_work": report.other_work,
    }
    found: dict[str, Any] = _finite(told)
    return found


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def headline(report: Report) -> str:
    machine, plan = report.machine, report.plan
    others = "" if report.other_work is None else f"; other processes took {report.other_work:.0%} of the processors"
    return (
        f"{machine.cpu}, {len(plan.cores)} cores for each server and its client; {machine.memory_bytes / _GB:.0f} GB; "
        f"{machine.system}; Python {machine.python}, torch {machine.torch}; model shapes, seed {plan.seed}, "
        f"rounds {plan.rounds}{others}{f'; stopped early: {report.stopped}' if report.stopped else ''}"
    )


def tables(report: Report, held: Sequence[Held] = (), record: Record | None = None) -> Iterator[Table]:
    """One a section, those without a figure left out; the bars last."""
    made = (
        _saturated(report),
        _cpu(report),
        _paced(report, own=False),
        _paced(report, own=True),
        _overload(report),
        _ratios(ratios(report)),
        _failures(report),
        _held(held, record),
        _bars(list(bars(report))),
    )
    yield from (table for table in made if table.row_count)


def _saturated(report: Report) -> Table:
    users = report.capacities[0].saturated.users if report.capacities else 0
    columns = ("server", "threads", "images/s", "Tandem over it", "pictures", "refused", "no picture", "others")
    table = plain_table(f"Mixed work, {users} users always waiting", *columns)
    table.caption = (
        f"The same {report.plan.orders} orders in the same sequence, weighed by their work; the range is "
        "of parts of the window, or of rounds. *: best for this server, used below. Ratio: both at their best."
    )
    for name in report.plan.servers:
        best = report.threads(name)
        for threads in report.plan.threads:
            found = [one.saturated for one in report.capacities if (one.server, one.threads) == (name, threads)]
            if not found:
                continue
            rate = found[0].rate if len(found) == 1 else Spread.of([one.rate.median for one in found])
            over = f"{report.capacity(TANDEM) / report.capacity(name):.2f}x" if threads == best else ""
            table.add_row(
                name,
                f"{threads}{'*' if threads == best else ' '}",
                spread_text(rate),
                "" if name == TANDEM else over,
                str(sum(one.images for one in found)),
                str(sum(one.refused for one in found)),
                str(sum(sum(one.lost.values()) for one in found)),
                f"{max(one.others for one in found):.0%}",
            )
    return table


def _cpu(report: Report) -> Table:
    """Of Tandem, where it is saturated."""
    found = report.saturated(TANDEM)
    table = plain_table("CPU of an image, Tandem saturated", "process", "ms", "of the server's")
    table.caption = "For each image of the mix, user and system. The client is not the server's, but shares its cores."
    means = {role: sum(one.cpu_s.get(role, 0.0) for one in found) / len(found) for role in (*ROLES, CLIENT)}
    whole = sum(seconds for role, seconds in means.items() if role != CLIENT)
    for role, seconds in means.items():
        if seconds and whole:
            share = "" if role == CLIENT else f"{seconds / whole:.1%}"
            table.add_row(role, f"{1e3 * seconds:,.1f}", share)
    return table


def _paced(report: Report, *, own: bool) -> Table:
    """The same rate for all, or each at its own."""
    load = f"{report.plan.load:.0%}"
    title = f"Each at {load} of its own capacity, s" if own else f"The same arrivals, at {load} of Tandem's capacity, s"
    columns = ("server", "images/s", "throughput", "goodput", "P50", "P95", "P99", "worst", "no picture", "others")
    table = plain_table(title, *columns)
    table.caption = (
        f"Open loop (Poisson), from the intended send time; the first {LEAD_S:g} s don't count. Goodput: pictures "
        f"within {report.plan.deadline_s:g} s. Median (and range) of rounds; an order without a picture took for ever."
    )
    shown = [one for one in report.paced if one.of == (one.server if own else TANDEM)]
    for name in report.plan.servers:
        found = [one for one in shown if one.server == name]
        if not found or all(one.server == TANDEM for one in shown):
            continue
        windows = [one.offered.window for one in found]
        table.add_row(
            name,
            f"{found[0].offered.rate:.2f}",
            range_text([one.throughput for one in windows]),
            range_text([one.goodput for one in windows]),
            *(_tails(windows, pick) for pick in ("p50", "p95", "p99", "worst")),
            str(sum(one.refused + sum(one.lost.values()) for one in windows)),
            f"{max(one.offered.others for one in found):.0%}",
        )
    return table


def _tails(windows: Iterable[Window], pick: str) -> str:
    values = [getattr(one.tail, pick) for one in windows]
    spread = Spread.of([math.inf if value is None else value for value in values])
    if spread.low == spread.high:
        return _seconds(spread.median)
    return f"{_seconds(spread.median)} ({_seconds(spread.low)}-{_seconds(spread.high)})"


def _seconds(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.2f}"


def _overload(report: Report) -> Table:
    # The limits on streams are the bench's, and no news.
    told = {**report.plan.settings, "jobs": report.settings["jobs"]}
    given = ", ".join(f"{name} {value}" for name, value in flat(told))
    columns = (
        "server",
        "load",
        "offered",
        "goodput",
        "pictures/s",
        "refused",
        "P50 ms",
        "P99 ms",
        "own P50",
        "own P99",
    )
    table = plain_table("Overload: multiples of Tandem's capacity", *columns, "late or lost", "others")
    table.caption = (
        f"Stages of {SETTLE_S:g} + {report.plan.stage_s:g} s without a pause between; the former don't count. Goodput: "
        f"work a second of pictures within {report.plan.deadline_s:g} s, in images of the mix; pictures/s counts them. "
        "P50, P99: refusals from the intended send time; own: from when they were really sent. Median (and range) of "
        f"rounds. Tandem with {given}; a baseline's line holds what it draws in {report.plan.queued_s:g} s."
    )
    for name in report.plan.servers:
        for factor in report.plan.factors:
            found = [one for one in report.stages if (one.server, one.factor) == (name, factor)]
            if found:
                windows = [one.offered.window for one in found]
                others = f"{max(one.offered.others for one in found):.0%}"
                table.add_row(name, f"{factor:g}x", *_overload_cells(windows), others)
    return table


def _overload_cells(windows: Sequence[Window]) -> Iterator[str]:
    yield f"{windows[0].offered:.2f}"
    yield range_text([one.goodput for one in windows])
    yield f"{median(one.images_s for one in windows):.2f}"
    yield str(sum(one.refused for one in windows))
    for kind in ("refusals", "refusals_own"):
        found = [refusals for one in windows if (refusals := getattr(one, kind))]
        for pick in (p50, p99):
            yield f"{1e3 * median(map(pick, found)):.1f}" if found else ""
    yield str(sum(sum(one.lost.values()) for one in windows))


def _ratios(found: Iterable[Ratio]) -> Table:
    table = plain_table("Ratios", "", "median (range)", "rounds", "better")
    for one in found:
        table.add_row(one.name, ratio_text(one.value), str(one.value.count), "high" if one.higher_is_better else "low")
    return table


def _failures(report: Report) -> Table:
    table = plain_table("Orders without a picture that were not refused", "in", "reason", "orders")
    table.caption = "Also of the orders that only settle a queue, and count for nothing else."
    found: Counter[tuple[str, str]] = Counter()
    for one in report.capacities:
        for reason, count in one.saturated.lost.items():
            found[f"{one.server}, saturated", reason] += count
    for turn in report.paced:
        for reason, count in turn.offered.lost.items():
            found[f"{turn.server}, {turn.load:.0%} of {turn.of}", reason] += count
    for stage in report.stages:
        for reason, count in stage.offered.lost.items():
            found[f"{stage.server}, {stage.factor:g}x", reason] += count
    for (where, reason), count in found.items():
        table.add_row(where, Text(reason), str(count))
    return table


def _held(held: Sequence[Held], record: Record | None) -> Table:
    columns = ("", "recorded", "tolerance", "measured", "", "recorded by")
    table = plain_table("Against the ratios on record", *columns)
    if record is None:
        return table
    known = {one.ratio.name: one for one in held}
    for name, recorded in record.ratios.items():
        told, verdict = "", Text("not measured", style="dim")
        if one := known.get(name):
            told = ratio_text(one.ratio.value)
            verdict = Text("worse", style="red") if one.worse else Text("holds", style="green")
        source = str(recorded.measured) if recorded.measured else "set, not measured"
        table.add_row(name, f"{recorded.value:.2f}", f"{recorded.tolerance:.2f}", told, verdict, Text(source))
    return table


def _bars(found: list[Bar]) -> Table:
    table = Table("bar", "wanted", "measured", "", "limit", title="Bars", box=SIMPLE_HEAD)
    for bar in found:
        verdict = "in doubt" if bar.doubt else "met" if bar.met else "not met"
        style = "green" if bar.met else "yellow"
        table.add_row(bar.what, bar.wanted, bar.measured, Text(verdict, style=style), bar.doubt or bar.limit)
    return table
