"""`tandem bench cold-start`: what an order waits for that finds no replica awake."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from serve.cli.bench import check_writable, show, write
from serve.cli.bench_soak import telling
from serve.cli.extras import loadtest as part
from serve.cli.options import Assignments, settings_tree
from serve.cli.running import run


def cold_start(
    starts: Annotated[int, typer.Option(min=1, help="How often.")] = 5,
    model: Annotated[str, typer.Option(metavar="SOURCE", help="As the setting `model.source`.")] = "shapes",
    threads: Annotated[
        int | None, typer.Option(min=1, help="torch threads of the denoiser.", show_default="all cores but one")
    ] = None,
    assignments: Assignments = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON.")] = None,
) -> None:
    """Start a server whose replica sleeps after a second, order a picture, and tell where the time goes from the order
    to the picture, again and again.
    """
    if json_file is not None:
        check_writable(json_file)
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (0,)
    plan = part("bench.cold_start:Plan")(
        starts=starts,
        model=model,
        budget=part("servers:Budget")(cores=cores, torch_threads=threads or max(1, len(cores) - 1)),
        settings=settings_tree(assignments or ()),
    )
    with telling() as tell:
        report = run(part("bench.cold_start:measure")(plan, tell))
    if json_file is not None:
        write(json.dumps(part("bench.cold_start_report:as_json")(report), indent=2) + "\n", json_file)
    show(part("bench.cold_start_report:headline")(report), part("bench.cold_start_report:tables")(report))
