"""What `tandem trace` prints: a job's stages on its time line, or the means of several jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve.cli.jobs_screen import plain
from serve.cli.screen import COLORS, cache_line, place
from serve.domain.jobs import JobState

if TYPE_CHECKING:
    from serve.cli.trace import Bar, Mean, Trace

_WAITS = {"retried", "queued", "batch", "decode_wait"}
"""Stages in which nobody works for the job."""
_WORK, _WAIT, _BESIDE, _NOBODY = "cyan", "yellow", "green", "red"
_FACT = 12
_NAME, _NUMBER, _SHARE, _GAP = 11, 8, 7, 2
_LEAST_CELLS, _MOST_CELLS = 8, 100
_WHY = "the job's settlement, and turns between the parts"


def shown_trace(one: Trace) -> None:
    console = Console(highlight=False)
    job = one.job
    state = Text(job.state.value, style=COLORS.get(job.state, "cyan"))
    console.print(Text.assemble(("job ", "bold"), (plain(job.id), "bold"), "  ", state), soft_wrap=True)
    for name, fact in _facts(one):
        console.print(Text.assemble((f"{name:<{_FACT}}", "dim"), fact))
    console.print()
    if one.bars:
        console.print(_chart(one, console))
        console.print(_legend(one, console.options.ascii_only))
    console.print(_sum(one))


def shown_means(traces: Sequence[Trace], means: Sequence[Mean], left_out: int) -> None:
    """`left_out` jobs have not ended."""
    console = Console(highlight=False)
    if traces:
        wall = sum(each.wall_s or 0.0 for each in traces) / len(traces)
        unexplained = sum(each.gap.seconds for each in traces if each.gap) / len(traces)
        table = _table(**dict.fromkeys(("stage", "jobs", "mean ms", "share", "longest ms")))
        for mean in means:
            table.add_row(
                _named(mean.stage), str(mean.jobs), _ms(mean.mean_s), _percent(mean.mean_s, wall), _ms(mean.worst_s)
            )
        table.add_row("in no stage", "", _ms(unexplained), _percent(unexplained, wall), "", style="dim")
        console.print(table)
        jobs = "1 job" if len(traces) == 1 else f"{len(traces)} jobs"
        console.print(f"{jobs}, {_ms(wall)} ms on average; explains {_percent(wall - unexplained, wall)} of it")
    if left_out:
        console.print(f"{left_out} more {'has' if left_out == 1 else 'have'} not ended")
    elif not traces:
        console.print("no jobs")


def _facts(one: Trace) -> Iterator[tuple[str, str]]:
    """What stands above the chart."""
    job, timings = one.job, one.timings
    if not job.state.terminal:
        going = job.state is not JobState.QUEUED
        yield "now", f"{job.state.value}, step {job.step} of {job.steps}" if going else place(job)
    request = job.raw.get("request") or {}
    size = f"{request['width']} x {request['height']}, " if "width" in request and "height" in request else ""
    number = request.get("num_images", 1)
    yield "order", plain(f"{job.model}, {size}{job.steps} steps" + (f", {number} images" if number != 1 else ""))
    if (attempt := job.raw.get("attempt")) not in (None, 0):
        yield "attempt", str(attempt)
    if line := cache_line(job):
        slowest = {"memory": "memory", "redis": "Redis", "encoded": "an encoder"}.get(timings.text_from or "", "")
        yield (
            "text",
            f"{line.removeprefix('text units: ')}" + (f"; read from {slowest}" if slowest else ""),
        )
    if timings.batch_images is not None:
        yield "steps", f"{timings.batch_images:.1f} images shared one on average"


def _chart(one: Trace, console: Console) -> Table:
    """A row a stage; beside it its bar where it lies on the time line."""
    columns = {"stage": _NAME, "ms": _NUMBER} | ({"share": _SHARE} if one.wall_s else {})
    table = _table(**columns)
    cells = console.width - sum(width + _GAP for width in columns.values())
    cells = min(_MOST_CELLS, max(_LEAST_CELLS, cells))
    table.add_column("", no_wrap=True, width=cells)
    parts = list(_rows(one))
    whole = one.wall_s or max(bar.starts_s + bar.seconds for bar, _ in parts)
    for bar, style in parts:
        share = [_percent(bar.seconds, one.wall_s) if style != _BESIDE else ""] if one.wall_s else []
        drawn = _drawn(bar, whole, cells, _symbol(style, console.options.ascii_only))
        table.add_row(Text(_named(bar.stage)), _ms(bar.seconds), *share, Text(drawn, style=style))
    return table


def _rows(one: Trace) -> Iterator[tuple[Bar, str]]:
    """Every bar and its colour: what lies beside the stages after the one in which it began, what is in no stage where
    it lies."""
    ahead = one.ahead
    ends = [bar for bar in one.bars if bar.stage == "told"]
    stages = [bar for bar in one.bars if bar.stage != "told"]
    for bar in stages:
        yield bar, _WAIT if bar.stage in _WAITS else _WORK
        if ahead is not None and bar.stage in ("queued", stages[-1].stage):
            yield ahead, _BESIDE
            ahead = None
    if one.gap is not None:
        yield one.gap, _NOBODY
    yield from ((bar, _WORK) for bar in ends)


def _drawn(bar: Bar, whole: float, cells: int, symbol: str) -> str:
    """Spaces up to where it begins, then at least one cell."""
    first = min(cells - 1, int(cells * bar.starts_s / whole)) if whole > 0 else 0
    last = min(cells, max(first + 1, round(cells * (bar.starts_s + bar.seconds) / whole))) if whole > 0 else 1
    return " " * first + symbol * (last - first)


def _symbol(style: str, ascii_only: bool) -> str:
    symbols = {_WORK: "#", _WAIT: "-", _BESIDE: "=", _NOBODY: "?"}
    return symbols[style] if ascii_only else {_WORK: "█", _WAIT: "░", _BESIDE: "▒", _NOBODY: "╳"}[style]


def _legend(one: Trace, ascii_only: bool) -> Text:
    styles = {style for _, style in _rows(one)}
    words = {_WORK: "work", _WAIT: "waits", _BESIDE: "beside the others", _NOBODY: "in no stage"}
    told = [(f"{_symbol(style, ascii_only)} ", style) for style in words if style in styles]
    text = Text()
    for symbol, style in told:
        text.append(symbol, style=style)
        text.append(f"{words[style]}   ", style="dim")
    return text


def _sum(one: Trace) -> str:
    if one.wall_s is None:
        so_far = sum(bar.seconds for bar in one.bars)
        return f"{_ms(so_far)} ms so far are told of; it has not ended" if one.bars else "nothing is told of it yet"
    if one.explained is None:
        return "it took no time"
    said = f"explains {100 * one.explained:.1f} % of {_ms(one.wall_s)} ms"
    return said if one.gap is None else f"{said}; {_ms(one.gap.seconds)} ms are in no stage: {_WHY}"


def _table(**widths: int | None) -> Table:
    """The first column is a name; figures stand to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, (column, width) in enumerate(widths.items()):
        table.add_column(column, justify="right" if number else "left", no_wrap=True, width=width)
    return table


def _named(stage: str) -> str:
    return stage.replace("_", " ")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}" if abs(seconds) < 10 else f"{1e3 * seconds:,.0f}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""
