"""`tandem loadtest`: load on a server as its users make it, and a report of what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve.cli.extras import loadtest as part
from serve.cli.options import Key
from serve.cli.running import run
from serve.errors import OperatorError


def loadtest(
    workload: Annotated[
        str | None, typer.Argument(metavar="WORKLOAD", help="One of --list, or a .yaml file.", show_default=False)
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="URL", help="The server to test.", show_default="one of its own, on all cores")
    ] = None,
    key: Key = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, help="Requests a second.", show_default="as the workload says"),
    ] = None,
    capacity: Annotated[
        float | None,
        typer.Option(min=0.001, help="Requests a second that are a load of 1.", show_default="measured first"),
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.1, metavar="SECONDS", help="Length.", show_default="as the workload says")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Fixes every request and when it is due.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="For the report.", show_default="loadtest-WORKLOAD-TIME")
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="The server's Prometheus page; one for each node.", show_default="its own server's"
        ),
    ] = None,
    web: Annotated[bool, typer.Option("--web", help="Locust's page, with the same users, until Ctrl-C.")] = False,
    web_port: Annotated[int, typer.Option(min=1, max=65535, help="Its port.")] = 8089,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Tell the workloads that there are, and exit.")] = False,
) -> None:
    """Send a server the requests of a workload, on a clock, and write a report: report.html, plots, result.json.

    Latency counts from when a request was due. Exit code 0: every threshold of the workload is met; 1: one is missed.
    """
    if listed:
        part("command:show_workloads")()
        return
    if workload is None:
        raise OperatorError("loadtest: name a WORKLOAD; --list tells which there are", "workload")
    if rate is not None and capacity is not None:
        raise OperatorError("--rate and --capacity: name one of them", "rate")
    plan = part("command:Plan").of(
        workload,
        target=target,
        key=key,
        rate=rate,
        capacity=capacity,
        duration_s=duration,
        seed=seed,
        out=out,
        metrics=tuple(metrics or ()),
    )
    story = part("command:page")(plan, web_port) if web else part("command:report")(plan, as_json=as_json)
    raise typer.Exit(run(story))
