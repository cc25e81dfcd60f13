"""Cold starts as a table for people and as JSON for machines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table

from loadtest.bench.cold_start import Report
from serve.bench.report import machine_line, plain_table


def as_json(report: Report) -> dict[str, Any]:
    return asdict(report) | {"medians": dict(report.medians), "first_images_s": list(report.first_images_s)}


def headline(report: Report) -> str:
    plan = report.plan
    what = f"{plan.starts} cold starts of a replica of {plan.model}; cores {', '.join(map(str, plan.budget.cores))}"
    return machine_line(report.machine, "cpu", what, None)


def tables(report: Report) -> Iterator[Table]:
    table = plain_table("From an order that finds nobody awake to its picture", "phase", "s", "from", "to")
    for phase, median in report.medians.items():
        of = [start[phase] for start in report.starts]
        table.add_row(phase, f"{median:.2f}", f"{min(of):.2f}", f"{max(of):.2f}")
    whole = sorted(report.first_images_s)
    table.add_row("the first image", f"{sum(report.medians.values()):.2f}", f"{whole[0]:.2f}", f"{whole[-1]:.2f}")
    yield table
