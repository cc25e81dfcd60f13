"""`tandem bench cache`: what the cache of forward passes is worth."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from serve.cli.bench import check_writable, named, own_server, show, write
from serve.cli.bench_soak import telling
from serve.cli.extras import loadtest as part
from serve.cli.extras import want
from serve.cli.running import run
from serve.errors import OperatorError

_ENCODERS = ("t5-small", "t5-base")
_ORDERS, _QUICK_ORDERS = 400, 60
_ROUNDS, _QUICK_ROUNDS = 5, 2
_SECONDS, _QUICK_SECONDS = 120.0, 8.0


def cache(
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="T5 of the text model: t5-small, t5-base.",
            show_default="t5-base; with --quick t5-small",
        ),
    ] = None,
    orders: Annotated[
        int | None, typer.Option(min=1, help="Pictures for each kind of traffic.", show_default="400; with --quick 60")
    ] = None,
    users: Annotated[int, typer.Option(min=1, max=64, help="Orders under way at once.")] = 8,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Repetitions, with and without in turns.", show_default="5; with --quick 2"),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Length of each open loop.", show_default="120; with --quick 8")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Fixes weights, texts and arrivals.")] = 0,
    only: Annotated[
        str | None, typer.Option(metavar="SECTION,...", help="Sections to run: traffic, t5.", show_default="all")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two to three minutes: few orders, a small T5.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON.")] = None,
) -> None:
    """Measure the cache of forward passes: forwards for each job and hit rates by tier and sign as texts repeat, and
    latency of a T5's embeddings with the cache against without.

    Exit code 1 when a request failed.
    """
    if json_file is not None:
        check_writable(json_file)
    want("locust")
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (0,)
    known = part("bench.cache:SECTIONS")
    shapes = named(encoder, _ENCODERS, _ENCODERS[:1] if quick else _ENCODERS[1:], "--encoder")
    if len(shapes) > 1:
        raise OperatorError("--encoder: name one", "encoder")
    plan = part("bench.cache:Plan")(
        sections=frozenset(named(only, known, known, "--only")),
        orders=orders or (_QUICK_ORDERS if quick else _ORDERS),
        users=users,
        seed=seed,
        budget=part("servers:Budget")(cores=cores, torch_threads=max(1, len(cores) - 1)),
        paired=part("bench.cache_paired:PairedPlan")(
            encoder=shapes[0],
            rounds=rounds or (_QUICK_ROUNDS if quick else _ROUNDS),
            seconds=seconds or (_QUICK_SECONDS if quick else _SECONDS),
            threads=len(cores),
            seed=seed,
        ),
    )
    with telling() as tell:
        report = run(part("bench.cache:measure")(plan, own_server, tell))
    if json_file is not None:
        write(json.dumps(part("bench.cache_report:as_json")(report), indent=2) + "\n", json_file)
    show(part("bench.cache_report:headline")(report), part("bench.cache_report:tables")(report))
    raise typer.Exit(1 if part("bench.cache_report:any_failed")(report) else 0)
