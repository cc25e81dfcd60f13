"""What `tandem plan` prints: a grid of models by cards, and what stands behind each of its cells.

Whatever a colour says stands there in characters too: a mark before the rung.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from serve.cli.plan_rows import GB, Card, Fit, Grid, Row
from serve.memory.planner import USABLE
from serve.models.denoiser import FLOAT16
from serve.rungs import Rung
from serve.telemetry.logs import escape

SHORT = {
    Rung.VAE_SLICING: "slice vae",
    Rung.VAE_TILING: "tile vae",
    Rung.ATTENTION_SLICING: "slice attn",
    Rung.SEQUENTIAL_OFFLOAD: "sequential",
}
"""What some rungs are called in a cell of the grid; the others by their names."""
_MARKS = {Fit.WHOLE: ("✓", "+", "green"), Fit.SQUEEZED: ("!", "!", "yellow"), Fit.NONE: ("–", "-", "red")}
"""Mark, mark on a console that has ASCII alone, colour."""
_NAME, _CELL, _FACT = 15, 12, 9
"""Characters."""
_DETAILED = 4
"""So many rows are told in full without being asked."""


def show(grid: Grid, *, detail: bool, console: Console | None = None) -> None:
    """`grid` has a row for each model with a cell for each card."""
    console = console or Console(highlight=False, markup=False)
    ascii_only = console.options.ascii_only
    for first, last in _fitting(len(grid[0]), console.width):
        console.print(_table([row[first:last] for row in grid], ascii_only))
    console.print()
    console.print(_legend(ascii_only))
    cells = [cell for row in grid for cell in row]
    for cell in cells if detail or len(cells) <= _DETAILED else ():
        console.print()
        _print_detail(console, cell)


def _fitting(columns: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of columns, as many at a time as the console has room for."""
    many = max(1, (width - _NAME) // (_CELL + 1))
    for first in range(0, columns, many):
        yield first, min(first + many, columns)


def _table(grid: Grid, ascii_only: bool) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0, header_style="bold")
    table.add_column("", width=_NAME, overflow="fold")
    for cell in grid[0]:
        table.add_column(_heading(cell.card), min_width=_CELL, max_width=_CELL, overflow="fold")
    for row in grid:
        size = f"{row[0].plan.width} x {row[0].plan.height}"
        name = Text.assemble((escape(row[0].model.shape.name), "bold"), (f"\n{size}", "dim"))
        table.add_row(name, *(_cell(cell, ascii_only) for cell in row))
    return table


def _heading(card: Card) -> Text:
    gpu = card.gpu
    number = f" x {card.number}" if card.number else ""
    told = "" if gpu.name == f"{gpu.memory_gb:g}gb" else f"\n{gpu.memory_gb:.3g} GB{number}"
    return Text.assemble(escape(gpu.name), (told, "dim"))


def _cell(cell: Row, ascii_only: bool) -> Text:
    mark, plain, style = _MARKS[cell.fit]
    sign = plain if ascii_only else mark
    if cell.fit is Fit.NONE:
        return Text(f"{sign} no", style=style)
    peak = cell.plan.footprint.peak / GB
    size = f"{peak:.1f} GB" if peak < 9.95 else f"{peak:3.0f} GB"
    time = f" {time_of(cell.speed.seconds):>5}" if cell.speed else ""
    rung = SHORT.get(cell.plan.rung, cell.plan.rung.value)
    return Text.assemble((f"{sign} {rung}", style), (f"\n{size}{time}", "dim"))


def time_of(seconds: float) -> str:
    """In at most five characters, up to a hundred hours."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 999.5 else f"{seconds / 3600:.1f} h"


def _legend(ascii_only: bool) -> Text:
    line = Text()
    words = {
        Fit.WHOLE: "whole on the card",
        Fit.SQUEEZED: "weights packed, or coming and going",
        Fit.NONE: "does not fit",
    }
    for fit, (mark, plain, style) in _MARKS.items():
        line.append(f"{plain if ascii_only else mark} ", style=style).append(f"{words[fit]}   ", style="dim")
    line.append("\nGB at the peak, seconds of one image. Texts are encoded elsewhere.", style="dim")
    return line


def _print_detail(console: Console, cell: Row) -> None:
    """The arithmetic behind a cell."""
    gpu, plan = cell.card.gpu, cell.plan
    mark, plain, style = _MARKS[cell.fit]
    how = f"{plan.rung.value} in {plan.dtype}" if plan.fits else f"does not fit, not even on the rung {plan.rung.value}"
    title = (escape(cell.model.shape.name), "bold"), f" on {escape(gpu.name)}, {plan.width} x {plan.height}: "
    console.print(Text.assemble(*title, (f"{plain if console.options.ascii_only else mark} {how}", style)))
    table = Table.grid(padding=(0, 1))
    table.add_column(width=_FACT, style="dim")
    table.add_column()
    for name, fact in _facts(cell):
        table.add_row(name, fact)
    console.print(Padding(table, (0, 0, 0, 2)))


def _facts(cell: Row) -> Iterator[tuple[str, str]]:
    plan, gpu = cell.plan, cell.card.gpu
    if plan.dtype == "float16" and cell.model.shape.family not in FLOAT16:
        yield "precision", "the model was trained in bfloat16, which the card has not: in float16 it may overflow"
    if gpu.like not in ("", gpu.name):
        yield "card", f"{gpu.memory_gb:.3g} GB, like a {gpu.like}"
    yield "memory", f"{_memory_sum(cell)} GB, of {_gb(plan.budget)} ({100 * USABLE:.0f} % of the card)"
    if cell.passed:
        yield "no room", "for " + ", ".join(f"{rung.value} ({_gb(peak)})" for rung, peak in cell.passed)
    if not plan.fits:
        return
    turn = "beside the steps of others" if plan.footprint.beside else "between two steps"
    way = "whole" if cell.decode == "whole" else f"in tiles of {plan.tile}"
    yield "decoding", f"one image at a time, {way}, {turn}"
    wide, high = cell.max_size
    images = plan.lanes // cell.model.shape.lanes
    yield "largest", f"{wide} x {high}; up to {images} of {plan.width} x {plan.height} in one step"
    yield "share", f"{cell.share:.2f} of the card, {cell.replicas} replica{'s' * (cell.replicas != 1)} on one"
    if cell.speed is None:
        yield "time", "not known: the card's figures are not"
        return
    yield "time", f"{time_of(cell.speed.seconds)} for an image, predicted:"
    for term in cell.speed.terms:
        yield "", f"{time_of(term.seconds)} {term.name}: {term.how}"


def _memory_sum(cell: Row) -> str:
    """How the peak comes about, in GB."""
    held = cell.plan.footprint
    vae = max(held.decode, held.encode)
    phases = f"step {_gb(held.step)}", f"VAE {_gb(vae)}"
    on_top = " + ".join(phases) if held.beside else f"the larger of {phases[0]} and {phases[1]}"
    return f"weights {_gb(held.weights)} + {on_top} = {_gb(held.peak)}"


def _gb(size: int) -> str:
    return f"{size / GB:.2f}"
