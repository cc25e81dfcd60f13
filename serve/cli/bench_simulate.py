"""`tandem bench simulate`: what `tandem simulate` computes of this machine, beside what it measures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from serve.cli.bench import check_writable, show, write
from serve.cli.bench_soak import telling
from serve.cli.extras import loadtest as part
from serve.cli.extras import want
from serve.cli.running import run
from serve.errors import OperatorError

_LOADS = "0.3,0.5,0.7"
_SECONDS, _QUICK_SECONDS = 60.0, 15.0
_LEARNING_S, _QUICK_LEARNING_S = 40.0, 10.0
_LEAST, _MOST = 0.01, 0.95


def simulate(
    loads: Annotated[str, typer.Option(metavar="X,...", help="Of the capacity, what is compared.")] = _LOADS,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Of each load.", show_default="60; with --quick 15")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Fixes the orders.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="About two minutes: few orders.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="For the fleets and traces of `tandem simulate`."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON.")] = None,
) -> None:
    """Hold the simulation against a server of its own: open loops of mixed orders through the shipped model, and the
    same orders simulated, with step times and overheads from other orders.

    Exit code 1 when P50 or P95 is off by more than 15 %.
    """
    wanted = _shares(loads)
    if json_file is not None:
        check_writable(json_file)
    if out is not None:
        _keep({}, out)  # not after minutes that it can't be written
    want("locust")
    want("lupa")
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (0,)
    plan = part("bench.calibration:Plan")(
        loads=wanted,
        seconds=seconds or (_QUICK_SECONDS if quick else _SECONDS),
        learning_s=_QUICK_LEARNING_S if quick else _LEARNING_S,
        seed=seed,
        budget=part("servers:Budget")(cores=cores, torch_threads=max(1, len(cores) - 1)),
    )
    with telling() as tell:
        report = run(part("bench.calibration:measure")(plan, tell))
    if out is not None:
        _keep(part("bench.calibration_report:files")(report), out)
    if json_file is not None:
        write(json.dumps(part("bench.calibration_report:as_json")(report), indent=2) + "\n", json_file)
    show(part("bench.calibration_report:headline")(report), part("bench.calibration_report:tables")(report))
    raise typer.Exit(0 if report.within else 1)


def _shares(written: str) -> list[float]:
    """Raises OperatorError naming the option."""
    try:
        found = [float(each) for each in written.split(",")]
    except ValueError:
        found = []
    if not found or not all(_LEAST <= each <= _MOST for each in found):
        raise OperatorError(f"--loads {written}: write shares of the capacity from {_LEAST} to {_MOST}, as in {_LOADS}")
    return found


def _keep(files: Mapping[str, str], out: Path) -> None:
    """Raises OperatorError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OperatorError(f"--out: {out}: {error.strerror}", "out") from None
