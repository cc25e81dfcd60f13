"""`tandem bench compare`: Tandem against what its users run today, in one run on the same cores."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from serve.cli.bench import check_writable, named, show, write
from serve.cli.extras import loadtest as part
from serve.cli.extras import want
from serve.cli.options import Assignments, settings_tree
from serve.cli.running import run
from serve.errors import OperatorError

_ROUNDS, _CAPACITY_ROUNDS, _SECONDS = 5, 3, 15.0
_QUICK: dict[str, Any] = {
    "rounds": 1,
    "orders": 72,
    "seconds": 10.0,
}
_QUICK_SERVERS = ("tandem", "lock")
_QUICK_SECTIONS = ("capacity", "same-rate", "overload")


def compare(
    servers: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Who runs.", show_default="all; with --quick tandem,lock")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="SECTION,...",
            help="What is measured beside the capacity.",
            show_default="all; with --quick no own-rate",
        ),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Threads of torch that each server may choose from; its best is compared.",
            show_default="1,2; with --quick all but one core",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Repetitions, in turns. The capacity has 3 of them beside other sections.",
            show_default="5; with --quick 1",
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Length of each open loop.", show_default="15; with --quick 10")
    ] = None,
    load: Annotated[float, typer.Option(min=0.05, max=2, help="Of the capacity, in the open loops.")] = 0.8,
    deadline: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds; goodput counts pictures within it.", show_default="10")
    ] = None,
    queued: Annotated[
        float | None,
        typer.Option(min=0.1, help="Tandem's jobs.max_queued_s under overload.", show_default="0.35 of the deadline"),
    ] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Send the overload to every server.")] = False,
    assignments: Assignments = None,
    seed: Annotated[int, typer.Option(min=0, help="Fixes orders and arrivals.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="About four minutes: two servers, one round.")] = False,
    check: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare the ratios with those on record in this file.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON.")] = None,
) -> None:
    """Measure Tandem against a lock around the stock pipeline, Celery, LitServe and Ray Serve with one deployment:
    throughput, latency at the same arrivals, and what Tandem makes of overload.

    Exit code 1 when an order or a server failed, or a ratio got worse than `--check` allows.
    """
    want("locust")
    if json_file is not None:
        check_writable(json_file)
    record = check and part("bench.compare_ratios:read_record")(check)
    given = {"rounds": rounds, "seconds": seconds, "load": load, "deadline_s": deadline, "queued_s": queued}
    asked = {"everyone": everyone, "seed": seed, "settings": settings_tree(assignments or ())}
    plan = _plan(servers, only, threads, quick, asked | given)
    for package in ("celery", "litserve"):
        if package in plan.servers:
            want(package)
    if record:
        part("bench.compare_ratios:comparable")(plan, record, check)
    report = _measure(plan)
    held = part("bench.compare_ratios:hold")(part("bench.compare_ratios:ratios")(report), record) if record else ()
    if json_file is not None:
        write(json.dumps(part("bench.compare_report:as_json")(report, held), indent=2) + "\n", json_file)
    tables = part("bench.compare_report:tables")(report, held, record)
    show(part("bench.compare_report:headline")(report), tables)
    raise typer.Exit(1 if report.faults or report.stopped or any(one.worse for one in held) else 0)


def _plan(servers: str | None, only: str | None, threads: str | None, quick: bool, given: dict[str, Any]) -> Any:
    """A `loadtest.bench.compare_plan.Plan`. Raises OperatorError that names the option."""
    known, sections = part("servers:NAMES"), part("bench.compare_plan:SECTIONS")
    names = named(servers, known, _QUICK_SERVERS if quick else known, "--servers")
    if "tandem" not in names:
        raise OperatorError("--servers: tandem must be among them: every ratio is to it", "servers")
    measured = named(only, sections, _QUICK_SECTIONS if quick else sections, "--only")
    cores = part("bench.compare_plan:own_cores")()
    offered = _threads(threads, len(cores)) if threads else _few(len(cores), quick)
    chosen = {name: value for name, value in given.items() if value is not None}
    deadline_s = chosen.setdefault("deadline_s", 10.0)
    chosen.setdefault("queued_s", 0.35 * deadline_s)
    chosen = {"rounds": _ROUNDS, "seconds": _SECONDS} | (_QUICK if quick else {}) | chosen
    return part("bench.compare_plan:Plan")(
        servers=names,
        threads=offered,
        cores=cores,
        sections=frozenset(measured),
        capacity_rounds=chosen["rounds"] if measured == ("capacity",) else min(chosen["rounds"], _CAPACITY_ROUNDS),
        **chosen,
    )


def _few(cores: int, quick: bool) -> tuple[int, ...]:
    return (max(1, cores - 1),) if quick else (1, 2) if cores > 1 else (1,)


def _threads(written: str, cores: int) -> tuple[int, ...]:
    try:
        found = tuple(dict.fromkeys(int(word) for word in written.split(",")))
    except ValueError:
        raise OperatorError(f"--threads: {written} is no list of numbers", "threads") from None
    if wrong := [number for number in found if not 1 <= number <= cores]:
        raise OperatorError(f"--threads: {wrong[0]} threads, and this process may use {cores} cores", "threads")
    return found


def _measure(plan: Any) -> Any:
    """A `loadtest.bench.compare_plan.Report`; progress is told on the way."""
    with Console(stderr=True).status("") as status:
        began, now = time.monotonic(), ""

        def line(more: str = "") -> str:
            return f"{time.monotonic() - began:4.0f} of about {plan.about_s:.0f} s: {now}{more}"

        def tell(what: str) -> None:
            nonlocal now
            now = what
            status.update(line())
            if not status.console.is_terminal:
                status.console.print(line(), markup=False, highlight=False)

        def progress(so_far: Any) -> None:
            median = "" if so_far.p50_s is None else f", P50 {so_far.p50_s:.2f} s"
            refused = f", {so_far.refused} refused" if so_far.refused else ""
            status.update(line(f" ({so_far.done} pictures, {so_far.under_way} under way{refused}{median})"))

        return run(part("bench.compare:measure")(plan, tell, progress))
