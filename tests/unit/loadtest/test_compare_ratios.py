"""Ratios, the bars over them and the record that they are held to: worse fails, slower does not."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from loadtest.bench.compare import Run, max_waiting, turns
from loadtest.bench.compare_bars import bars
from loadtest.bench.compare_load import Offered, Saturated
from loadtest.bench.compare_plan import Capacity, Paced, Plan, Report, Stage
from loadtest.bench.compare_ratios import (
    GOODPUT,
    P95,
    SHORT,
    Record,
    comparable,
    goodput_ratio,
    hold,
    p95_ratio,
    ratios,
    read_record,
    throughput_name,
)
from loadtest.bench.compare_ratios import RECORD as RECORD_FILE
from loadtest.bench.compare_report import as_json, headline, tables
from loadtest.bench.compare_work import Window
from loadtest.tail import Tail
from serve.bench.bars import Bar
from serve.bench.machine import Machine
from serve.bench.stats import Percentiles, Spread
from serve.errors import OperatorError

MACHINE = Machine(
    cpu="a processor", cores=2, memory_bytes=8 * 10**9, system="s", python="3", torch="2", threads=2, gpu=None
)
FACTORS = (0.8, 1.0, 1.2, 5.0)


def capacity(server: str, rate: float, threads: int = 2, others: float = 0.0) -> Capacity:
    saturated = Saturated(
        users=24,
        rate=Spread(median=rate, low=rate, high=rate, count=1),
        cpu_s={"diffusion": 0.3 / rate, "client": 0.01},
        images=100,
        refused=0,
        lost={},
        faults=0,
        others=others,
    )
    return Capacity(server=server, threads=threads, round=0, saturated=saturated)


def offered(rate: float, p95: float | None, goodput: float, refusal_s: float | None, others: float) -> Offered:
    refusals = None if refusal_s is None else Percentiles.of([refusal_s] * 50)
    window = Window(
        seconds=20.0,
        offered=rate,
        throughput=goodput,
        goodput=goodput,
        images_s=goodput,
        tail=Tail(count=100, p50=0.5, p95=p95, p99=None, worst=None),
        refused=0 if refusals is None else 50,
        refusals=refusals,
        refusals_own=refusals,
        lost={} if p95 else {"failed 500": 7},
        sent_late_s=0.001,
    )
    return Offered(rate=rate, window=window, lost=window.lost, faults=0 if p95 else 7, others=others)


def report(speed: float = 1.0, tandem: float = 6.0, refusal_s: float = 0.01, others: float = 0.0) -> Report:
    """A whole run on a machine of that speed; Tandem's capacity and latency by its own."""
    servers = ("tandem", "lock", "litserve")
    plan = Plan(servers=servers, threads=(1, 2), cores=(0, 1), rounds=3, factors=FACTORS)
    rates = {"tandem": tandem, "lock": 4.0, "litserve": 3.0}
    found = [capacity(name, rate * speed, 2, others) for name, rate in rates.items()]
    found.append(capacity("lock", 3.5 * speed, threads=1))
    p95s = {"tandem": 6.0 / tandem / speed, "lock": 5.0 / speed, "litserve": None}
    paced = [
        Paced(server=name, round=number, load=0.8, of="tandem", offered=offered(4.8, p95s[name], 4.0, None, others))
        for number in range(3)
        for name in servers
    ]
    paced.append(Paced(server="lock", round=0, load=0.8, of="lock", offered=offered(3.2, 0.1, 3.0, None, others)))
    good = dict(zip(FACTORS, (0.8, 0.98, 1.0, 0.97), strict=True))
    stages = [
        Stage(
            server="tandem",
            round=number,
            factor=factor,
            offered=offered(
                factor * tandem, 1.0, good[factor] * tandem * speed, refusal_s if factor > 1 else None, others
            ),
        )
        for number in range(3)
        for factor in FACTORS
    ]
    settings = {"http": {}, "jobs": {"max_queued_s": 3.5}}
    return Report(machine=MACHINE, plan=plan, settings=settings, capacities=found, paced=paced, stages=stages)


def test_each_server_is_compared_at_its_best() -> None:
    told = report()
    assert told.threads("lock") == 2
    assert told.capacity("lock") == 4.0
    found = {one.name: one.value.median for one in ratios(told)}
    assert found[throughput_name("lock")] == pytest.approx(1.5)
    assert found[throughput_name("litserve")] == pytest.approx(2.0)
    assert found[P95] == pytest.approx(0.2)
    assert found[GOODPUT] == pytest.approx(0.97)


def test_the_p95_is_held_to_the_quickest_rival() -> None:
    turn = [one for one in report().paced if one.round == 0]
    assert p95_ratio(turn) == pytest.approx(1.0 / 5.0)  # its own pace of 0.1 s plays no part
    assert p95_ratio(turn[:1]) is None
    never = [
        replace(one, offered=offered(4.8, None, 4.0, None, 0.0)) if one.server == "tandem" else one for one in turn
    ]
    assert p95_ratio(never) == math.inf
    assert p95_ratio([one for one in turn if one.server != "lock" or one.of == "lock"]) == 0.0


def test_goodput_is_held_to_the_peak_below_overload() -> None:
    climb = [one for one in report().stages if one.round == 0]
    assert goodput_ratio(climb) == pytest.approx(0.97)
    assert goodput_ratio(climb[:3]) is None
    none = [replace(one, offered=offered(1.0, 1.0, 0.0, None, 0.0)) for one in climb]
    assert goodput_ratio(none) == 0.0


def verdicts(told: Report) -> list[tuple[bool, bool]]:
    return [(bar.met, bool(bar.doubt)) for bar in bars(told)]


def test_bars_are_met_missed_or_in_doubt() -> None:
    assert verdicts(report(tandem=8.0)) == [(True, False)] * 5
    assert verdicts(report(tandem=7.9)) == [(False, False), *[(True, False)] * 4]
    assert verdicts(report(tandem=2.3)) == [(False, False), (False, False), *[(True, False)] * 3]
    assert verdicts(report(tandem=8.0, refusal_s=0.05)) == [*[(True, False)] * 3, *[(False, False)] * 2]
    assert verdicts(report(tandem=8.0, others=0.2)) == [(False, True)] * 5


def p95_bar(told: Report) -> Bar:
    return next(bar for bar in bars(told) if bar.what.startswith("P95"))


def test_a_rate_beyond_the_baselines_capacity_is_told_beside_its_p95() -> None:
    within, beyond = p95_bar(report(tandem=5.0)), p95_bar(report(tandem=6.0))
    assert "(100% of the quickest baseline's)" in within.what
    assert within.measured == "0.24"
    assert "(120% of the quickest baseline's)" in beyond.what
    assert beyond.measured == "0.20; beyond the baseline's capacity: depends on the run's length"
    told = report()
    no_picture = replace(told, paced=[one for one in told.paced if one.server != "lock"])
    assert "no baseline had a picture for 95 of 100 orders" in p95_bar(no_picture).measured


def test_a_baselines_line_under_overload_is_as_long_as_tandems() -> None:
    plan = Plan(cores=(0,), queued_s=3.5)
    assert max_waiting(plan, 4.0) == 14
    assert max_waiting(plan, 0.1) == 1


RECORD = Record.model_validate(
    {
        "ratios": {
            throughput_name("lock"): {
                "value": 1.6,
                "tolerance": 0.15,
                "measured": {"on": "2026-11-21", "machine": "here", "by": "hand", "rounds": 5},
            },
            P95: {"value": 0.19, "tolerance": 0.05},
            GOODPUT: {"value": 0.99, "tolerance": 0.05},
            "of something else": {"value": 1.0, "tolerance": 0.0},
        },
    }
)


def worse(told: Report) -> set[str]:
    return {one.ratio.name for one in hold(ratios(told), RECORD) if one.worse}


def test_a_worse_ratio_fails_and_a_slower_machine_does_not() -> None:
    assert worse(report()) == set()
    slow = report(speed=0.25)
    assert slow.capacity("lock") == 1.0
    assert worse(slow) == set()
    assert worse(report(tandem=5.6)) == {throughput_name("lock")}
    assert worse(report(tandem=4.5)) == {throughput_name("lock"), P95}
    assert worse(report(tandem=60.0)) == set()


def test_the_record_of_this_repository_is_one_that_a_run_is_checked_with(tmp_path: Path) -> None:
    record, plan = read_record(RECORD_FILE), Plan(cores=(0,))
    assert set(record.ratios) == {SHORT, throughput_name("lock"), P95, GOODPUT}
    for section in ("capacity", "same-rate", "overload"):
        comparable(replace(plan, sections=frozenset({section})), record, tmp_path)
    assert {one.ratio.name for one in hold(ratios(report()), record)} == set(record.ratios) - {SHORT}


def test_a_check_of_nothing_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    plan = Plan(servers=("tandem", "celery"), cores=(0,), sections=frozenset({"capacity"}))
    with pytest.raises(OperatorError, match="this run measures none of"):
        comparable(plan, RECORD, tmp_path)
    comparable(replace(plan, sections=frozenset({"overload"})), RECORD, tmp_path)
    comparable(replace(plan, servers=("tandem", "lock")), RECORD, tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "Invalid JSON"),
        ('{"ratios": {}}', "ratios"),
        ('{"ratios": {"a": {"value": 0, "tolerance": 0}}}', "ratios.a.value"),
        ('{"ratios": {"a": {"value": 1, "tolerance": 0, "more": 1}}}', "ratios.a.more"),
        ('{"ratios": {"a": {"value": 1, "tolerance": 0, "measured": "soon"}}}', "ratios.a.measured"),
    ],
)
def test_a_record_that_is_none_is_refused_by_its_key(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "ratios.json"
    file.write_text(text)
    with pytest.raises(OperatorError, match=f"--check {file}: .*{named}"):
        read_record(file)
    with pytest.raises(OperatorError, match="No such file"):
        read_record(tmp_path / "nowhere.json")


def test_the_report_is_tables_and_json() -> None:
    told = report()
    held = hold(ratios(told), RECORD)
    figures = json.loads(json.dumps(as_json(told, held), allow_nan=False))
    assert figures["best_threads"] == {"tandem": 2, "lock": 2, "litserve": 2}
    assert figures["ratios"][GOODPUT]["median"] == pytest.approx(0.97)
    assert {one["ratio"] for one in figures["check"]} == set(RECORD.ratios) - {"of something else"}
    assert [bar["met"] for bar in figures["bars"]] == [False, *[True] * 4]
    console = Console(width=200, record=True, file=io.StringIO())
    for table in tables(told, held, RECORD):
        console.print(table)
    text = console.export_text()
    for title in (
        "Mixed work, 24 users",
        "CPU of an image",
        "The same arrivals, at 80% of Tandem's capacity",
        "Each at 80% of its own capacity",
        "Overload",
        "Ratios",
        "Orders without a picture",
        "Against the ratios on record",
        "Bars",
    ):
        assert title in text
    assert "never" in text
    assert "not measured" in text
    assert "2026-11-21, here, hand, rounds 5" in text
    assert "set, not measured" in text
    assert "jobs.max_queued_s 3.5" in text
    assert "a processor, 2 cores" in headline(told)
    assert told.faults == 21
    assert headline(replace(told, stopped="lock is gone")).endswith("stopped early: lock is gone")


def test_servers_take_turns() -> None:
    order = list(turns(("a", "b", "c"), 4))
    assert [name for _, name in order] == [*"abc", *"bca", *"cab", *"abc"]
    assert [number for number, _ in order] == sorted(list(range(4)) * 3)


def test_a_run_tells_how_long_it_takes() -> None:
    full = Plan(cores=(0, 1))
    assert full.about_s > replace(full, rounds=1).about_s > replace(full, rounds=1, sections=frozenset()).about_s > 0
    assert replace(full, everyone=True).about_s > full.about_s


def test_what_is_set_goes_into_the_servers_settings_beside_the_benchs_own() -> None:
    given = {"diffusion": {"max_rows": 8}, "http": {"max_streams": 9}, "jobs": {"attempts": 2}}
    settings = Run(Plan(cores=(0,), settings=given, queued_s=2.0), lambda _: None).report.settings
    assert settings["diffusion"] == {"max_rows": 8}
    assert settings["http"]["max_streams"] == 9 < settings["http"]["max_connections"]
    assert settings["jobs"] == {"max_queued_s": 2.0, "attempts": 2}
