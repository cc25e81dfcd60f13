"""`tandem bench prompts`: what the prompt language does to pictures, and what changing a prompt costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from serve.cli.bench import check_writable, show, write
from serve.cli.bench_soak import telling

_COUNT, _QUICK_COUNT = 40, 4


def prompts(
    count: Annotated[
        int | None, typer.Option(min=1, help="Prompts for each effect.", show_default="40; with --quick 4")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON.")] = None,
) -> None:
    """Draw prompts of the shipped model with weights, negative prompts, blends, switches, ramps and compositions, and
    have its judge say how often the picture moves as it should; count what sweeps over one number cost the encoder.

    Exit code 1 when fewer than three quarters of the pictures do, or a sweep encoded twice.
    """
    if json_file is not None:
        check_writable(json_file)
    from serve.bench.language import measure
    from serve.bench.language_report import as_json, headline, passed, tables

    with telling() as tell:
        report = measure(count or (_QUICK_COUNT if quick else _COUNT), tell)
    if json_file is not None:
        write(json.dumps(as_json(report), indent=2) + "\n", json_file)
    show(headline(report), tables(report))
    raise typer.Exit(0 if passed(report) else 1)
