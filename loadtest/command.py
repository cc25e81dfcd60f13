"""The story of `tandem loadtest`: a server, its capacity where the workload wants it, the trace, the report."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.table import Table

from loadtest.capacity import CAPACITY_S, capacity, warm_up
from loadtest.driver import Progress, check_target, drive
from loadtest.report.page import write_report
from loadtest.report.results import Result, summary
from loadtest.report.scrape import LINGER_S, Scraper
from loadtest.report.thresholds import FIGURES, check, finite
from loadtest.samples import Sample
from loadtest.screen import Screen, here, print_figures
from loadtest.servers import TANDEM, Budget, serving
from loadtest.trace import Catalog, fetch_catalog, trace
from loadtest.workload import Workload, load, names
from serve.cli.client import KEY_VARIABLE, bearer
from serve.cli.extras import want
from serve.errors import OperatorError

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
_EVERY_S = 2.0
_MISSED, _INTERRUPTED = 1, 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the operator asked for. `file` is the workload as it was named, `workload` with the options' values in it.
    `target` None: a server of the run's own. `capacity` None: measured, where the workload has a `load`."""

    file: str
    workload: Workload
    target: str | None
    key: str | None
    capacity: float | None
    seed: int
    out: Path
    metrics: tuple[str, ...]

    @classmethod
    def of(
        cls,
        file: str,
        *,
        target: str | None,
        key: str | None,
        rate: float | None,
        capacity: float | None,
        duration_s: float | None,
        seed: int,
        out: Path | None,
        metrics: tuple[str, ...],
    ) -> Self:
        """Raises OperatorError that names the option."""
        want("locust")
        bearer(key)
        Scraper(metrics)
        workload = load(file)
        if duration_s is not None:
            workload = workload.lasting(duration_s)
        if rate is not None:
            workload = workload.at(rate)
        if capacity is not None and workload.load is None:
            raise OperatorError(f"--capacity: {workload.name} has no load that it would be the measure of", "capacity")
        return cls(
            file=file,
            workload=workload,
            target=target.rstrip("/") if target else None,
            key=(key or "").strip() or None,
            capacity=capacity,
            seed=seed,
            out=out or Path(f"loadtest-{workload.name}-{time.strftime('%Y%m%d-%H%M%S')}"),
            metrics=metrics,
        )


def show_workloads() -> None:
    table = Table("workload", "whose traffic it is", box=None, header_style="bold")
    for name in names():
        table.add_row(name, load(name).description)
    Console(highlight=False).print(table)


async def report(plan: Plan, *, as_json: bool) -> int:
    """Run it and write the report. The exit code: 0, or 1 where a threshold is missed; 130 for a run that was cut
    short, whose report has what there is. Raises OperatorError."""
    _check_writable(plan.out)
    with Screen() as screen:
        async with _server(plan, screen) as (target, metrics):
            catalog = await fetch_catalog(target, plan.key)
            workload = await _with_rate(plan, target, catalog, screen)
            result, interrupted = await _run(plan, workload, target, metrics, catalog, screen)
        screen.tell("writing the report")
        page = await asyncio.to_thread(write_report, result, plan.out)
    figures = summary(result)
    verdicts = check(figures, result.thresholds)
    if as_json:
        told = {"workload": workload.name, "target": target, "report": str(page), "interrupted": interrupted}
        values = {name: finite(figure.of(figures)) for name, figure in FIGURES.items()}
        print(json.dumps(told | {"met": all(each.met for each in verdicts), "figures": values}, indent=2))
    else:
        print_figures(result, figures, verdicts, page)
    return _INTERRUPTED if interrupted else 0 if all(each.met for each in verdicts) else _MISSED


async def page(plan: Plan, port: int) -> int:
    """Locust's own page, until Ctrl-C. Raises OperatorError."""
    with Screen() as screen:
        async with _server(plan, screen) as (target, _):
            catalog = await fetch_catalog(target, plan.key)
            workload = await _with_rate(plan, target, catalog, screen)
            trace(workload, plan.seed, catalog)  # what is wrong with it is told here rather than on the page
            options = {
                "--workload": plan.file,
                "--host": target,
                "--seed": plan.seed,
                "--duration": workload.duration_s,
            }
            if workload.rate is not None:
                options["--rate"] = workload.rate
            screen.tell(f"Locust's page: http://127.0.0.1:{port} (Ctrl-C ends it)")
            words = [str(word) for option in options.items() for word in option]
            return await _locust([*words, "--web-host", "127.0.0.1", "--web-port", str(port)], plan.key)


async def _locust(words: Sequence[str], key: str | None) -> int:
    environ = os.environ | ({KEY_VARIABLE: key} if key else {})
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--users", "1", "--end-with-stdin", *words),
        stdin=asyncio.subprocess.PIPE,  # it ends when this process does, however that comes
        env=environ,
        start_new_session=True,
    )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


@asynccontextmanager
async def _server(plan: Plan, screen: Screen) -> AsyncGenerator[tuple[str, tuple[str, ...]]]:
    """The address of the one that is tested, and its metrics pages."""
    if plan.target is not None:
        await check_target(plan.target)
        yield plan.target, plan.metrics
        return
    screen.tell("starting a server")
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (0,)
    budget = Budget(cores=cores, torch_threads=max(1, len(cores) - 1))
    async with serving(TANDEM, budget=budget, settings=plan.workload.server) as server:
        yield server.url, plan.metrics or ((server.metrics_url,) if server.metrics_url else ())
        screen.tell("stopping the server")


async def _with_rate(plan: Plan, target: str, catalog: Catalog, screen: Screen) -> Workload:
    """The workload with requests a second; the server is warm then."""
    workload = plan.workload
    if workload.load is None or plan.capacity is not None:
        screen.tell("warming up")
        await warm_up(target, workload, catalog, plan.seed, plan.key)
        return workload.for_capacity(plan.capacity) if plan.capacity is not None else workload
    screen.tell(f"measuring the capacity, {CAPACITY_S:g} s")
    found = await capacity(target, workload, catalog, plan.seed, plan.key, screen.show)
    workload = workload.for_capacity(found)
    screen.tell(f"{found:.2f} requests a second; {plan.workload.load:g} times as many are {workload.rate:.2f}")
    return workload


async def _run(
    plan: Plan, workload: Workload, target: str, metrics: tuple[str, ...], catalog: Catalog, screen: Screen
) -> tuple[Result, bool]:
    """What came of the trace, and whether it was cut short."""
    arrivals = trace(workload, plan.seed, catalog)
    screen.begin(workload, len(arrivals))
    samples: list[Sample] = []
    looks: list[Progress] = []

    def look(progress: Progress) -> None:
        looks[:] = [progress]
        screen.show(progress)

    scraper = Scraper(metrics, _EVERY_S, linger_s=LINGER_S if metrics else 0.0)
    try:
        async with scraper:
            await drive(
                target,
                arrivals,
                users=workload.users,
                give_up_s=workload.give_up_s,
                key=plan.key,
                on_progress=look,
                until_s=workload.duration_s if workload.users else None,
                into=samples,
            )
        interrupted = False
    except asyncio.CancelledError:
        if not samples:
            raise
        interrupted = True
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()  # what follows has to wait for things, too
    return _result(plan, workload, target, scraper, samples, looks[-1], interrupted), interrupted


def _result(
    plan: Plan,
    workload: Workload,
    target: str,
    scraper: Scraper,
    samples: Sequence[Sample],
    last: Progress,
    interrupted: bool,
) -> Result:
    """A run that was cut short, and a closed loop, lasted as long as they did."""
    lasted = last.elapsed_s if interrupted or workload.users else workload.duration_s
    return Result(
        workload=workload.name,
        target=target,
        started_at=last.started_at,
        duration_s=min(lasted, workload.duration_s) if interrupted else lasted,
        deadline_s=workload.deadline_s,
        samples=tuple(sorted(samples, key=lambda sample: sample.index)),
        warm_up_s=workload.warm_up_s if workload.warm_up_s < lasted else 0.0,
        series=scraper.series,
        machine=here(),
        thresholds=workload.thresholds,
        settings=workload.model_dump(mode="json") | {"seed": plan.seed},
    )


def _check_writable(out: Path) -> None:
    """Not after minutes that the report can't be written."""
    try:
        if not out.is_dir():
            out.mkdir(parents=True)
            out.rmdir()  # until there is a report
    except OSError as error:
        raise OperatorError(f"--out {out}: {error.strerror}", "out") from None
