"""Writes the generated parts of docs/memory.md: what each kind of card serves, and the sums behind two of the cells.
With --check it only says whether the page is in step with serve/memory."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from serve.cli.plan_rows import GB, Asked, Card, Fit, Row, grid
from serve.cli.plan_screen import SHORT, show, time_of
from serve.cli.plan_wanted import wanted_cards, wanted_models
from serve.memory.classes import GpuClass
from serve.memory.speed import predicted

PAGE = Path(__file__).parent.parent / "docs" / "memory.md"
WIDTH = 110
MARKS = {Fit.WHOLE: "✓", Fit.SQUEEZED: "!", Fit.NONE: "–"}
SUMS = (("sd15", "4gb", None), ("sdxl", "11gb", None), ("sdxl", "11gb", (1536, 1536)), ("sd35-medium", "11gb", None))
"""Model, class, size: what is told in full."""
COMPARED = ("sd35-medium", "sdxl", "playground-v2.5", "auraflow", "sd35-large", "flux-dev", "flux-schnell")
PUBLISHED = {8: 0, 10: 1, 12: 1, 16: 3, 20: 4, 24: 5, 32: 7}
"""Of Stability AI's table: so many of `COMPARED`, from the left, it marks as running without compromise, by GB."""
OURS = (4, 8, 10, 11, 12, 16, 20, 24, 32)


def by_class() -> str:
    """Models by built-in classes."""
    cards = wanted_cards(None, {}, from_nvidia_smi=False)
    found = grid(wanted_models(None), cards, Asked())
    head = ["model", *(f"{each.gpu.name} ({each.gpu.like})" for each in cards)]
    lines = [[_name(row[0]), *(_cell(cell) for cell in row)] for row in found]
    return _table(head, lines)


def by_memory() -> str:
    """Cards by their memory alone, beside the published table."""
    models = wanted_models(",".join(COMPARED))
    cards = [
        Card(gpu=GpuClass(name=f"{size} GB", memory_gb=size, dtypes=("bfloat16", "float16", "float32")))
        for size in OURS
    ]
    found = grid(models, cards, Asked())
    head = ["memory", *COMPARED]
    lines = []
    for at, size in enumerate(OURS):
        without = PUBLISHED.get(size)
        cells = (_beside(row[at], None if without is None else column < without) for column, row in enumerate(found))
        lines.append([f"{size} GB", *cells])
    return _table(head, lines)


def sums() -> str:
    """As `tandem plan` prints them."""
    told = []
    for model, card, size in SUMS:
        width, height = size or (None, None)
        cards = wanted_cards(card, {}, from_nvidia_smi=False)
        found = grid(wanted_models(model), cards, Asked(width=width, height=height))
        console = Console(file=io.StringIO(), width=WIDTH, highlight=False, markup=False, record=True)
        show(found, detail=True, console=console)
        told.append(console.export_text().rstrip().rpartition("\n\n")[2])
    return "```text\n" + "\n\n".join("\n".join(map(str.rstrip, each.splitlines())) for each in told) + "\n```\n"


def guide() -> str:
    """Two images of SD 1.5 that step together on a 4 GB card, as the guides for such cards count."""
    ((cell,),) = grid(wanted_models("sd15"), wanted_cards("4gb", {}, from_nvidia_smi=False), Asked())
    both = predicted(cell.model.shape, cell.card.gpu, cell.plan, cell.model.steps, images=2)
    assert cell.speed
    assert both
    room = cell.plan.lanes // cell.model.shape.lanes
    return (
        f"By this sum {time_of(cell.speed.seconds)} for one image and {time_of(both.seconds)} for two that step "
        f"together (as many as {room} have room in a step), with nothing offloaded.\n"
    )


def _name(cell: Row) -> str:
    return f"`{cell.model.shape.name}` {cell.plan.width} x {cell.plan.height}"


def _cell(cell: Row) -> str:
    if cell.fit is Fit.NONE:
        return "– no"
    time = f", {time_of(cell.speed.seconds)}" if cell.speed else ""
    return f"{_rung(cell)}<br>{cell.plan.footprint.peak / GB:.1f} GB{time}"


def _rung(cell: Row) -> str:
    return f"{MARKS[cell.fit]} {SHORT.get(cell.plan.rung, cell.plan.rung.value)}"


def _beside(cell: Row, theirs: bool | None) -> str:
    """Bold where the published table says another thing."""
    differs = theirs is not None and theirs != (cell.fit is Fit.WHOLE)
    return f"**{_rung(cell)}**" if differs else _rung(cell)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


PARTS = {"plan-table": by_class, "plan-memory": by_memory, "plan-sums": sums, "plan-guide": guide}


def page(text: str) -> str:
    """The page with its generated parts as they are to be. Raises SystemExit where it lacks a marker."""
    for name, part in PARTS.items():
        between = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if not between.search(text):
            sys.exit(f"docs/memory.md has no markers {name}")
        made = part()
        text = between.sub(lambda found, made=made: f"{found[1]}{made}{found[2]}", text)
    return text


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    made = page(text)
    if "--check" not in sys.argv:
        PAGE.write_text(made, encoding="utf-8")
    elif text != made:
        sys.exit("docs/memory.md is not in step with serve/memory: run `make fix`")


if __name__ == "__main__":
    main()
