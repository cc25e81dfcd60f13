"""A soak as tables for people, as JSON for machines, and as a plot of memory over images."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from loadtest.bench.soak import CACHE_BYTES, SIDE, WHOLE_EVERY, Report
from loadtest.bench.soak_bars import MEMORY_LIMIT, Findings, Growth, bars, findings
from loadtest.bench.soak_trend import BLOCKS, PER, WIDE, Trend, Verdict
from loadtest.bench.soak_watch import WHOLE_SIDE
from loadtest.processes import OTHER, RAY_OTHER
from loadtest.report.drawing import CYCLE, GREY, style
from serve.bench.bars import Bar
from serve.bench.report import machine_line, plain_table

_KIB, _MIB = 1024, 1024 * 1024
_LINES = ("-", "--", ":", "-.")
_FLAT = (
    f"Growth: least squares after the caches were full, per {PER:,} images, with its 95 % interval (Student's t over "
    f"the means of up to {BLOCKS} stretches). Flat: less than {MEMORY_LIMIT // _KIB} KiB, or the interval holds 0 "
    f"and ends below {WIDE * MEMORY_LIMIT // _KIB}; in doubt: it holds 0 and more than that. "
    "Memory is what a process asked for itself, mapped files aside."
)


def as_json(report: Report) -> dict[str, Any]:
    """Every figure, what is worked out from them, and the bars."""
    found = findings(report)
    return asdict(report) | {
        "settings": report.plan.settings,
        "failed": report.fates.failed,
        "doubled": report.fates.doubled,
        "findings": asdict(found),
        "bars": [asdict(bar) for bar in bars(report, found)],
    }


def headline(report: Report) -> str:
    plan = report.plan
    what = (
        f"{plan.images:,} images of {SIDE} x {SIDE}, each {WHOLE_EVERY}th of {WHOLE_SIDE} x {WHOLE_SIDE}; "
        f"{plan.users} users; cores {', '.join(map(str, plan.budget.cores))}; records and pictures kept "
        f"{plan.result_ttl_s:g} s; caches bounded to {CACHE_BYTES // _MIB} MiB; seed {plan.seed}"
    )
    return machine_line(report.machine, "cpu", what, None)


def passed(report: Report) -> bool:
    """No bar is missed. One in doubt is neither met nor missed."""
    return all(bar.met or bar.doubt for bar in bars(report, findings(report)))


def tables(report: Report) -> Iterator[Table]:
    found = findings(report)
    yield _work(report)
    if report.fates.reasons:
        yield _reasons(report)
    yield _processes(report, found)
    yield _stores(report, found)
    if report.warnings and not passed(report):
        yield _warnings(report)
    yield _bars(list(bars(report, found)))


def plot(report: Report) -> bytes:
    """Memory of every process over the images: as it is, and beyond what it was when the caches were full. A PNG."""
    found = findings(report)
    with style():
        figure = Figure(figsize=(9.0, 7.0), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        whole, grown = figure.subplots(2, 1, sharex=True)
        for number, one in enumerate(found.processes):
            _line(whole, grown, report, found, one, number)
        steady = report.looks[found.steady].images if found.steady < len(report.looks) else None
        for axes in (whole, grown):
            if steady is not None:
                axes.axvline(steady, color=GREY, linewidth=1)
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        whole.set_yscale("log")
        whole.set_ylabel("MiB")
        whole.set_title("Memory of every process, without mapped files")
        grown.set_ylabel("MiB since the vertical line")
        grown.set_title("The same, beyond what it was when half of the images were drawn")
        grown.set_xlabel("images")
        grown.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        figure.legend(*whole.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()


def _line(whole: Axes, grown: Axes, report: Report, found: Findings, one: Growth, number: int) -> None:
    seen = [look for look in report.looks if one.pid in look.processes]
    images = [look.images for look in seen]
    memory = [look.own_bytes[one.pid] / _MIB for look in seen]
    form: dict[str, Any] = {
        "color": CYCLE[number % len(CYCLE)],
        "linestyle": _LINES[number // len(CYCLE) % len(_LINES)],
        "linewidth": 1.2,
    }
    whole.plot(images, memory, label=_named(one.role, one.name), **form)
    first = report.looks[found.steady].own_bytes[one.pid] / _MIB
    grown.plot(images, [each - first for each in memory], **form)
    # What happens before is the start's, and would flatten everything after it.
    late = [
        each - first for each, look in zip(memory, seen, strict=True) if look.at_s >= report.looks[found.steady].at_s
    ]
    low, high = grown.get_ylim() if number else (0.0, 0.0)
    grown.set_ylim(min(low, *late, -0.5), max(high, *late, 0.5))


def _work(report: Report) -> Table:
    table = plain_table(
        "Work", "images", "seconds", "images/s", "failed", "more attempts", "judged", "right", "P50 ms", "P99"
    )
    fates, right = report.fates, sum(one.right for one in report.judged)
    table.add_row(
        f"{fates.orders:,}",
        f"{report.seconds:,.0f}",
        f"{(fates.orders - fates.failed) / report.seconds:.1f}",
        str(fates.failed),
        str(fates.again),
        f"{len(report.judged):,}",
        f"{right:,}",
        *((f"{1e3 * each.p50:,.0f}", f"{1e3 * each.p99:,.0f}") if (each := fates.latency) else ("", "")),
    )
    table.caption = (
        f"Judged: pictures out of the result store; of {WHOLE_SIDE} x {WHOLE_SIDE} whole, of smaller ones the "
        "background. More attempts: jobs that took more than one. "
        f"{len(report.looks)} looks, of which {report.gaps} failed."
    )
    return table


def _reasons(report: Report) -> Table:
    table = plain_table("Orders without a picture", "reason", "orders")
    for reason, orders in report.fates.reasons.items():
        table.add_row(Text(reason), f"{orders:,}")
    return table


def _warnings(report: Report) -> Table:
    table = plain_table("The last warnings in the server's log", "")
    for line in report.warnings:
        table.add_row(Text(line))
    return table


def _processes(report: Report, found: Findings) -> Table:
    columns = ("process", "pid", "MiB", "most", "KiB growth", "", "descriptors", "threads")
    table = plain_table("Processes in the steady state", *columns)
    table.caption = _FLAT
    for one in found.processes:
        table.add_row(
            _named(one.role, one.name),
            str(one.pid),
            _ends(one.memory, _MIB, 1),
            f"{one.most / _MIB:,.1f}",
            _slope(one.memory),
            _verdict(one.memory),
            _ends(one.fds, 1, 0),
            _ends(one.threads, 1, 0),
        )
    for use in found.passing:
        table.add_row(_named(use.role, use.name), "", "came or went", "", "", "", "", "")
    return table


def _stores(report: Report, found: Findings) -> Table:
    table = plain_table("Stores", "", "start", "most", "end", "KiB growth", "")
    looks, start, end = report.looks, report.start, report.end
    rows: Sequence[tuple[str, int, Sequence[int], int]] = (
        ("job Redis: keys", start.jobs.keys, [look.jobs.keys for look in looks], end.jobs.keys),
        ("job Redis: records", start.jobs.records, [look.jobs.records for look in looks], end.jobs.records),
        ("cache Redis: keys", start.cache.keys, [look.cache.keys for look in looks], end.cache.keys),
        ("result store: files", start.result_files, [look.result_files for look in looks], end.result_files),
        ("data directory: files", start.all_files, [look.all_files for look in looks], looks[-1].all_files),
    )
    memory = (
        ("job Redis: KiB", start.jobs.bytes, [look.jobs.bytes for look in looks], end.jobs.bytes, found.job_redis),
        (
            "cache Redis: KiB",
            start.cache.bytes,
            [look.cache.bytes for look in looks],
            end.cache.bytes,
            found.cache_redis,
        ),
        ("data directory: KiB", start.all_bytes, [look.all_bytes for look in looks], looks[-1].all_bytes, None),
    )
    for what, first, each, last in rows:
        table.add_row(what, f"{first:,}", f"{max(each):,}", f"{last:,}", "", "")
    for what, first, each, last, line in memory:
        cells = (f"{value / _KIB:,.0f}" for value in (first, max(each), last))
        table.add_row(what, *cells, _slope(line), _verdict(line) if line else "")
    table.caption = (
        f"End: when everything was swept, {end.waited_s:.0f} s after the last image, and the cache cleared; of the "
        "data directory with the last image. The job Redis rewrites its file when that has doubled."
    )
    return table


def _bars(found: Sequence[Bar]) -> Table:
    table = Table("bar", "wanted", "measured", "", "limit", title="Bars", box=SIMPLE_HEAD)
    for bar in found:
        verdict = "met" if bar.met else "in doubt" if bar.doubt else "not met"
        color = "green" if bar.met else "yellow"
        table.add_row(bar.what, bar.wanted, bar.measured, Text(verdict, style=color), bar.doubt or bar.limit)
    return table


def _named(role: str, name: str) -> str:
    return f"{role}: {name.removeprefix('ray::')}" if role in (RAY_OTHER, OTHER) else role


def _ends(line: Trend | None, unit: float, digits: int) -> str:
    if line is None:
        return ""
    first, last = (f"{value / unit:,.{digits}f}" for value in (line.first, line.last))
    return first if first == last else f"{first} -> {last}"


def _slope(line: Trend | None) -> str:
    if line is None:
        return ""
    slope, low, high = (value / _KIB for value in (line.slope, line.low, line.high))
    return f"{slope:+,.1f} ({low:+,.1f} to {high:+,.1f})"


def _verdict(line: Trend | None) -> Text:
    if line is None:
        return Text("too few looks", style="yellow")
    verdict = line.verdict(MEMORY_LIMIT)
    return Text(verdict, style="" if verdict is Verdict.FLAT else "yellow")
