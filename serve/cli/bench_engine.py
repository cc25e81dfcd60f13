"""`tandem bench engine`: the step loop against the stock pipeline on the same cores."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from serve.cli.bench import BenchDevice, BenchDtype, check_writable, named, show, write
from serve.errors import OperatorError

if TYPE_CHECKING:
    from serve.bench.engine import Plan

_ORDERS, _QUICK_ORDERS = 192, 48
_SECONDS, _QUICK_SECONDS = 300.0, 15.0
_ROUNDS = 3
_PROFILE_S, _QUICK_PROFILE_S = 20.0, 3.0


def engine(
    model: Annotated[str, typer.Option(metavar="SOURCE", help="Model, as in `model.source`.")] = "shapes",
    device: Annotated[BenchDevice | None, typer.Option(help="Where.", show_default="cuda if there is one")] = None,
    dtype: Annotated[BenchDtype | None, typer.Option(help="Precision.", show_default="as auto")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads, and cores, of both sides.", show_default="all but one")
    ] = None,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Most images of one step.")] = 8,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Length of the open loop.", show_default="300; with --quick 15")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Fixes orders and arrivals.")] = 0,
    only: Annotated[
        str | None, typer.Option(metavar="SECTION,...", help="Sections to run.", show_default="all")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="About a minute: few images.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON.")] = None,
) -> None:
    """Measure the step loop against the stock pipeline: step time by size and batch, mixed work of 24 users, the same
    arrivals through both, a short job behind long ones.

    On a CPU both sides are held to the same cores. Exit code 1 when an image failed.
    """
    if json_file is not None:
        check_writable(json_file)
    _pin(threads or max(1, (os.cpu_count() or 1) - 1))
    plan = _plan(model, device, dtype, max_batch_size, only, quick, seconds, seed)
    from serve.bench.engine import measure
    from serve.bench.engine_report import as_json, headline, tables

    with Console(stderr=True).status("") as status:
        began = time.monotonic()

        def tell(what: str) -> None:
            line = f"{time.monotonic() - began:4.0f} s: {what}"
            status.update(line)
            if not status.console.is_terminal:
                status.console.print(line, markup=False, highlight=False)

        report = measure(plan, tell)
    if json_file is not None:
        write(json.dumps(as_json(report), indent=2) + "\n", json_file)
    show(headline(report), tables(report))
    loop = report.open_loop
    raise typer.Exit(1 if loop and (loop.engine.failed or loop.stock.failed) else 0)


def _plan(
    model: str,
    device: BenchDevice | None,
    dtype: BenchDtype | None,
    max_batch_size: int,
    only: str | None,
    quick: bool,
    seconds: float | None,
    seed: int,
) -> Plan:
    """Raises OperatorError that names the option."""
    from serve.bench.engine import SECTIONS, Plan
    from serve.settings.pools import DiffusionSettings

    sections: Sequence[str] = named(only, SECTIONS, SECTIONS, "--only")
    return Plan(
        source=model,
        diffusion=DiffusionSettings(
            device=device.value if device else "auto",
            dtype=dtype.value if dtype else "auto",
            max_batch_size=max_batch_size,
            profile_s=_QUICK_PROFILE_S if quick else _PROFILE_S,
            torch_threads=len(_cores()) if hasattr(os, "sched_getaffinity") else None,
        ),
        sections=frozenset(section for section in SECTIONS if section in sections),
        orders=_QUICK_ORDERS if quick else _ORDERS,
        rounds=1 if quick else _ROUNDS,
        seconds=seconds or (_QUICK_SECONDS if quick else _SECONDS),
        seed=seed,
    )


def _pin(threads: int) -> None:
    """Hold this process to so many cores, before torch starts its threads: the engine has a thread more than the stock
    pipeline, and must not win by it."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = _cores()
    if threads > len(cores):
        raise OperatorError(f"--threads: this process may use {len(cores)} cores", "threads")
    os.sched_setaffinity(0, cores[-threads:])


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))
