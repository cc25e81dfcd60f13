"""From the clocks of an order and a replica to the phases of a cold start."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from loadtest.bench.cold_start import BEFORE, CLAIM, DRAWN, Plan, Report, phases_of
from loadtest.bench.cold_start_report import as_json, headline, tables
from loadtest.servers import Budget
from serve.bench.machine import this_machine
from serve.jobs.terms import Start
from serve.scaling.start import Laps

JOB = {"created_at": 1000.0, "timings": {"queued_s": 12.0, "total_s": 13.5}}


def test_phases_follow_one_another_from_the_order_to_the_picture() -> None:
    now = 1003.0
    laps = Laps(1003.0, lambda: now)
    now = 1010.0
    laps.lap("imports", 1009.0)
    laps.lap("weights")
    phases = phases_of(JOB, laps.start)
    assert phases == {BEFORE: 3.0, "imports": 6.0, "weights": 1.0, CLAIM: 2.0, DRAWN: 1.5}
    assert sum(phases.values()) == JOB["timings"]["total_s"]


def test_a_clock_that_goes_back_makes_no_negative_phase() -> None:
    laps = Laps(1000.0, lambda: 990.0)
    laps.lap("imports")
    assert laps.start == Start(began_at=1000.0, phases={"imports": 0.0})


def test_the_report_tells_medians_and_the_whole() -> None:
    starts = [{BEFORE: 1.0, DRAWN: 2.0}, {BEFORE: 3.0, DRAWN: 2.0}, {BEFORE: 9.0, DRAWN: 5.0}]
    plan = Plan(starts=3, model="shapes", budget=Budget(cores=(0,), torch_threads=1), settings={})
    report = Report(machine=this_machine(), plan=plan, starts=starts, told_s=[1.0, 3.0, 9.0])
    assert as_json(report)["medians"] == {BEFORE: 3.0, DRAWN: 2.0}
    assert as_json(report)["first_images_s"] == [3.0, 5.0, 14.0]
    console = Console(file=io.StringIO(), width=100)
    console.print(*tables(report))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "the first image" in printed
    assert "14.00" in printed
    assert "3 cold starts of a replica of shapes" in headline(report)
    assert replace(report, starts=starts[:1]).medians == starts[0]
    assert pytest.approx(5.0) == sum(report.medians.values())
