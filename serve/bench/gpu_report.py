"""A card's figures as tables for people, as Markdown for the docs, and as JSON for machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from serve.bench.gpu import Report
from serve.bench.gpu_memory import PHASES, Held, worst_error
from serve.bench.gpu_speed import Drawn, StepSpeed
from serve.bench.report import machine_line, plain_table
from serve.bench.throughput import Throughput

WANTED_ERROR = 0.10
"""Of the memory that is predicted, in any phase."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table: a title, columns (the first is a name), rows of text, and what is to be known of them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


def as_json(report: Report) -> dict[str, Any]:
    """Every figure, with those that are worked out from others."""
    told = asdict(report)
    for section in ("memory", "rungs"):
        for entry, one in zip(told[section], getattr(report, section), strict=True):
            entry["fits"] = one.fits
            for phase, measured in zip(entry["phases"], one.phases, strict=True):
                phase["error"] = measured.error
    for entry, drawn in zip(told["images"], report.images, strict=True):
        entry["images_per_s"] = drawn.images_per_s
    return told | {"worst_error": worst_error([*report.memory, *report.rungs])}


def headline(report: Report) -> str:
    """The machine, and how far the predicted memory is off, in one line."""
    error = worst_error([*report.memory, *report.rungs])
    told = "" if error is None else f"; memory is predicted within {error:.0%} (wanted: {WANTED_ERROR:.0%})"
    what = f"{report.card.memory_bytes / 1e9:.1f} GB of it, random weights{told}"
    return machine_line(report.machine, "cuda" if report.machine.gpu else "cpu", what, None)


def tables(report: Report) -> Iterator[Table]:
    for sheet in sheets(report):
        table = plain_table(sheet.title, *sheet.columns)
        table.caption = sheet.caption or None
        for row in sheet.rows:
            table.add_row(*row)
        yield table


def markdown(report: Report) -> str:
    """The same tables for a document."""
    parts = [headline(report)]
    for sheet in sheets(report):
        lines = [f"**{sheet.title}**", ""]
        lines += [_line(sheet.columns), _line(["---"] * len(sheet.columns)), *map(_line, sheet.rows)]
        parts.append("\n".join([*lines, "", sheet.caption] if sheet.caption else lines))
    return "\n\n".join(parts) + "\n"


def sheets(report: Report) -> Iterator[Sheet]:
    """One for each section that has figures."""
    if report.memory:
        yield _held("Memory of a process that may take what its class has, GB: predicted / measured", report.memory)
    if report.rungs:
        yield _held("The same by rung", report.rungs)
    if report.steps:
        yield _steps(report.steps)
    if report.images:
        yield _images(report.images)
    if report.compile:
        yield _compiled(report.compile)
    if report.encoders:
        yield _encoders(report.encoders)
    if report.left_out:
        yield Sheet("Not measured", ("what, and why",), tuple((each,) for each in report.left_out))


def _held(title: str, held: Sequence[Held]) -> Sheet:
    about = ("model", "class", "rung", "dtype", "size")
    columns = (*about, *PHASES, "worst", "drawing", "reserved", "cap", "")
    caption = (
        "Worst: the largest error of a phase. Drawing: all that is in use while images are drawn one after another. "
        "Reserved: by torch's allocator, of its cap."
    )
    return Sheet(title, columns, tuple(map(_held_row, held)), caption)


def _held_row(one: Held) -> tuple[str, ...]:
    found = {phase.phase: _both(phase.predicted, phase.measured) for phase in one.phases}
    error = worst_error([one])
    about = (one.model, one.gpu_class, str(one.rung), one.dtype, f"{one.width} x {one.height}")
    worst = "" if error is None else f"{error:.1%}"
    drawing = _both(one.peak_predicted, one.peak) if one.peak else ""
    told = one.trouble or ", ".join(one.relief)
    return (*about, *(found.get(name, "") for name in PHASES), worst, drawing, _gb(one.reserved), _gb(one.cap), told)


def _both(predicted: int, measured: int) -> str:
    return f"{_gb(predicted)} / {_gb(measured)}"


def _steps(steps: Sequence[StepSpeed]) -> Sheet:
    rows = tuple(
        (
            one.model,
            one.dtype,
            f"{one.width} x {one.height}",
            str(one.lanes),
            _ms(one.seconds),
            _ms(one.seconds / one.lanes),
        )
        for one in steps
    )
    columns = ("model", "dtype", "size", "lanes", "step, ms", "a lane, ms")
    return Sheet("Steps by batch", columns, rows, "A guided image takes two lanes.")


def _images(drawn: Sequence[Drawn]) -> Sheet:
    columns = ("model", "dtype", "size", "steps", "batch", "images", "images/s", "s an image")
    rows = tuple(
        (
            one.model,
            one.dtype,
            f"{one.width} x {one.height}",
            str(one.steps),
            str(one.batch),
            str(one.images),
            f"{one.images_per_s:.3f}",
            f"{1 / one.images_per_s:.2f}",
        )
        for one in drawn
    )
    return Sheet("Images through the engine, its queue full", columns, rows, "Decoding is in it, text is not.")


def _compiled(steps: Sequence[StepSpeed]) -> Sheet:
    columns = ("model", "dtype", "lanes", "as written, ms", "compiled, ms", "faster", "first step, s")
    rows = tuple(
        (
            one.model,
            one.dtype,
            str(one.lanes),
            _ms(one.seconds),
            _ms(one.compiled_s),
            f"{one.seconds / one.compiled_s:.2f}x",
            f"{one.compiling_s:.1f}",
        )
        for one in steps
        if one.compiled_s is not None and one.compiling_s is not None
    )
    return Sheet("Compiled", columns, rows)


def _encoders(found: Sequence[Throughput]) -> Sheet:
    columns = (
        "encoder",
        "dtype",
        "tokens",
        "one by one, rows/s",
        "batched, rows/s",
        "rows",
        "ratio",
        "of the card's peak",
    )
    rows = tuple(
        (
            one.encoder,
            one.dtype,
            str(one.row_tokens),
            f"{one.single:,.0f}",
            f"{one.best.rows_per_s.median:,.0f}",
            str(one.best.size),
            f"{one.ratio:.1f}x",
            f"{one.share(one.best.rows_per_s.median):.0%}",
        )
        for one in found
    )
    return Sheet("Text encoders", columns, rows)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"
