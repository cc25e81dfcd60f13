"""The report of `tandem bench prompts` as tables for people and as JSON for machines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from serve.bench.language import Report
from serve.bench.report import machine_line, plain_table

MOST = 0.75
"""Of all pictures, the share that has to move as it should; an effect below it is marked."""


def passed(report: Report) -> bool:
    """Most pictures move as they should, and no sweep asked an encoder twice."""
    shown = sum(each.right for each in report.effects) >= MOST * sum(each.of for each in report.effects)
    return shown and not any(each.others for each in report.sweeps)


def as_json(report: Report) -> dict[str, Any]:
    return asdict(report) | {"passed": passed(report)}


def headline(report: Report) -> str:
    return machine_line(report.machine, "cpu", "shapes, 20 steps, guidance 3", report.other_work)


def tables(report: Report) -> Iterator[Table]:
    effects = plain_table("What the language does to pictures", "prompt", "wanted", "pictures", "rate", "")
    for each in report.effects:
        met = each.right >= MOST * each.of
        verdict = Text("" if met else f"below {MOST:.0%}", style="yellow")
        effects.add_row(each.what, each.wanted, f"{each.right} of {each.of}", f"{each.right / each.of:.0%}", verdict)
    effects.caption = (
        "Through planner, encoder and step loop; the judge looks at pixels alone. No training picture\n"
        "shows the thing in the first colour on that ground."
    )
    yield effects
    sweeps = plain_table("What changing one number costs the encoder", "sweep of", "jobs", "rows, first", "all others")
    for sweep in report.sweeps:
        sweeps.add_row(sweep.what, str(sweep.jobs), str(sweep.first), str(sweep.others))
    yield sweeps
