"""A calibration as tables for people, as JSON for machines, and as the files of `tandem simulate`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml
from rich.table import Table

from loadtest.bench.calibration import BAR, Report
from loadtest.bench.calibration_fit import PERCENTS
from serve.bench.report import machine_line, plain_table


def as_json(report: Report) -> dict[str, Any]:
    """Seconds, but for what says otherwise."""
    return {
        "machine": asdict(report.machine),
        "capacity_per_s": report.capacity,
        "learned_ms": asdict(report.overheads),
        "bar": BAR,
        "within": report.within,
        "loads": [asdict(each) | {"errors": each.errors} for each in report.compared],
    }


def headline(report: Report) -> str:
    plan, own = report.plan, report.overheads
    what = (
        f"capacity {report.capacity:.2f} orders a second; a claim {own.trip_ms:.1f} ms, text {own.text_ms:.1f} ms, "
        f"decoding {own.decode_ms:,.0f} ms a megapixel, all else around an order {own.store_ms:.1f} ms; "
        f"seed {plan.seed}"
    )
    return machine_line(report.machine, "cpu", what, report.other_work)


def tables(report: Report) -> Sequence[Table]:
    percents = [f"P{each}" for each in PERCENTS]
    names = [f"{percent} {what}" for percent in percents for what in ("measured", "simulated", "error")]
    table = plain_table("Measured and simulated", "load", "orders", "a second", "steps", *names)
    table.caption = f"The bar: {BAR:.0%}. " + ("Met." if report.within else "Missed.")
    for each in report.compared:
        figures = (
            text
            for percent in PERCENTS
            for text in (
                f"{each.measured_s[percent]:.2f} s",
                f"{each.simulated_s[percent]:.2f} s",
                f"{each.errors[percent]:+.1%}",
            )
        )
        table.add_row(f"{each.load:g}", str(each.orders), f"{each.rate:.2f}", f"x {each.pace:.2f}", *figures)
    return [table]


def files(report: Report) -> Mapping[str, str]:
    """A fleet and a trace for each load, by the names of their files."""
    found = {}
    for one, fleet, lines in zip(report.compared, report.fleets, report.lines, strict=True):
        tree = fleet.model_dump(mode="json", exclude_defaults=True)
        found[f"fleet-{one.load:g}.yaml"] = yaml.safe_dump(tree, sort_keys=False)
        told = (json.dumps(line.model_dump(exclude_defaults=True)) + "\n" for line in lines)
        found[f"load-{one.load:g}.jsonl"] = "".join(told)
    return found
