"""The engine's report as tables for people and as JSON for machines, with the bars that it is held against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from serve.bench.bars import Bar
from serve.bench.engine import Report
from serve.bench.engine_load import LOAD, LONG, LONG_JOBS, SHORT
from serve.bench.report import machine_line, percentile_cells, plain_table, spread_text

SATURATED = 1.3
"""How many times the stock pipeline's work the engine wants to do."""
P95 = 0.5
"""The engine's P95 over the stock pipeline's, at the load that nearly fills the latter."""
DISTURBED = 0.05


def as_json(report: Report) -> dict[str, Any]:
    told = asdict(report)
    told["caps"] = [{"width": w, "height": h, "images": images} for (w, h), images in report.caps.items()]
    for entry, one in zip(told["steps"], report.steps, strict=True):
        entry["gain"] = one.gain
    return told | {"bars": [asdict(bar) for bar in bars(report)]}


def headline(report: Report) -> str:
    where = f"{report.device}, {report.dtype}, model {report.model} ({report.family}), seed {report.seed}"
    return machine_line(report.machine, report.device, where, report.other_work)


def tables(report: Report) -> Iterator[Table]:
    if report.steps:
        yield _steps(report)
    if report.saturated:
        yield _saturated(report)
    if report.open_loop:
        yield _open_loop(report)
    if report.short:
        yield _short(report)
    if report.savings:
        yield _savings(report)
    if found := list(bars(report)):
        yield _bars(found)


def bars(report: Report) -> Iterator[Bar]:
    doubt = ""
    if report.other_work is not None and report.other_work > DISTURBED:
        doubt = f"disturbed: other processes took {report.other_work:.0%} of the processors"
    limit = ""
    if report.steps:
        gain = max(one.gain for one in report.steps)
        limit = f"steps of guided images in batches are {gain:.2f}x as fast as one by one, at best"
    if report.saturated:
        ratio = report.saturated.ratio.median
        yield _bar(
            "saturated, over one at a time", f">= {SATURATED:g}x", f"{ratio:.2f}x", ratio >= SATURATED, limit, doubt
        )
    if report.open_loop and report.open_loop.engine.seconds and report.open_loop.stock.seconds:
        share = report.open_loop.engine.seconds.p95 / report.open_loop.stock.seconds.p95
        what = f"P95 at {LOAD:.0%} of one-at-a-time's capacity, over its P95"
        yield _bar(what, f"<= {P95:g}", f"{share:.2f}", share <= P95, limit, doubt)
    if report.short:
        one = report.short
        first = one.short_s < one.first_long_s
        what = f"{SHORT} steps behind {LONG_JOBS} x {LONG} steps: ends"
        yield _bar(what, "first", "first" if first else "later", first, "", "")
        slower = one.last_s - one.alone_s
        what = "the long ones end later by"
        yield _bar(what, f"<= {one.own_s:.2f} s, its own time", f"{slower:.2f} s", slower <= one.own_s, "", doubt)


def _bar(what: str, wanted: str, measured: str, met: bool, limit: str, doubt: str) -> Bar:
    """What was met under disturbance is met all the same: others' work can only make it worse."""
    return Bar(
        what=what, wanted=wanted, measured=measured, met=met, limit="" if met else limit, doubt="" if met else doubt
    )


def _steps(report: Report) -> Table:
    sizes = sorted({time.images for one in report.steps for time in one.times})
    columns = ("size", *(f"{size}" for size in sizes), "gain", "batch", "decode")
    table = plain_table("One step of guided images together, ms an image", *columns)
    table.caption = (
        "Gain: the best batch's images a second over one by one. Batch: the most that the profile found to pay."
    )
    for one in report.steps:
        width, height = one.times[0].width, one.times[0].height
        found = {time.images: f"{1e3 * time.per_image:,.2f}" for time in one.times}
        cap = report.caps.get((width, height))
        cells = (found.get(size, "") for size in sizes)
        table.add_row(
            f"{width}x{height}",
            *cells,
            f"{one.gain:.2f}x",
            "" if cap is None else str(cap),
            f"{1e3 * one.decode_s:,.1f}",
        )
    return table


def _saturated(report: Report) -> Table:
    assert report.saturated is not None
    one = report.saturated
    table = plain_table(f"Mixed work, {one.users} users always waiting", "", "images/s", "over one at a time")
    table.caption = (
        "Steps 4-50, guidance none to 12, samplers, sizes and seeds mixed; the same orders through both, in turns."
    )
    table.add_row("stock pipeline, one at a time", spread_text(one.stock), "")
    table.add_row("engine", f"{one.stock.median * one.ratio.median:,.2f}", f"{spread_text(one.ratio)} x")
    return table


def _open_loop(report: Report) -> Table:
    assert report.open_loop is not None
    columns = ("", "images/s", "samples", "P50", "P95", "P99", "worst", "failed")
    table = plain_table(f"The same arrivals, at {LOAD:.0%} of one-at-a-time's capacity, ms", *columns)
    table.caption = "Open loop (Poisson), from the time at which an order was due."
    for one in (report.open_loop.stock, report.open_loop.engine):
        cells = ("0", "", "", "", "") if one.seconds is None else percentile_cells(one.seconds)
        table.add_row(one.what, f"{one.rate:.2f}", *cells, str(sum(one.failed.values())))
    return table


def _short(report: Report) -> Table:
    assert report.short is not None
    one = report.short
    columns = ("", "the short one ends", "the first long one", "the last long one")
    table = plain_table(f"{SHORT} steps, submitted behind {LONG_JOBS} jobs of {LONG} steps, s", *columns)
    table.add_row("together", f"{one.short_s:.2f}", f"{one.first_long_s:.2f}", f"{one.last_s:.2f}")
    table.add_row("alone", f"{one.own_s:.2f}", "", f"{one.alone_s:.2f}")
    return table


def _savings(report: Report) -> Table:
    kinds = list(dict.fromkeys(one.threshold for one in report.savings))
    names = ("half the steps" if kind is None else f"step_cache {kind:g}" for kind in kinds)
    table = plain_table("Forward passes saved, and the image's mean error in 1/255", "sampler", "steps", *names)
    table.caption = "Against the exact image. Half the steps, without a cache, is what a client may ask for anyway."
    for sampler, steps in dict.fromkeys((one.sampler, one.steps) for one in report.savings):
        own = {one.threshold: one for one in report.savings if (one.sampler, one.steps) == (sampler, steps)}
        table.add_row(sampler, str(steps), *(f"{own[kind].saved:.0%} / {own[kind].error:.1f}" for kind in kinds))
    return table


def _bars(found: list[Bar]) -> Table:
    table = Table("bar", "wanted", "measured", "", "limit", title="Bars", box=SIMPLE_HEAD)
    for bar in found:
        verdict = "met" if bar.met else "in doubt" if bar.doubt else "not met"
        style = "green" if bar.met else "yellow"
        table.add_row(bar.what, bar.wanted, bar.measured, Text(verdict, style=style), bar.doubt or bar.limit)
    return table
