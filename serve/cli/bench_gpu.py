"""`tandem bench gpu`: what this machine's card makes of the published models."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from serve.cli.bench import check_writable, named, show, write
from serve.errors import OperatorError

if TYPE_CHECKING:
    from serve.bench.gpu import Plan

_QUICK = ("sd15", "sdxl")
_MODELS = ("sd15", "sdxl", "sd35-medium", "sd35-large", "flux-dev")
_QUICK_IMAGES, _QUICK_LANES = 8, (1, 2, 8)


def gpu(
    models: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Published models.", show_default="five; with --quick sd15 and sdxl"),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="SECTION,...", help="Sections to run.", show_default="all")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes: two models, few batches.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON.")] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the tables as Markdown.")
    ] = None,
) -> None:
    """Measure a CUDA card with random weights at real shapes: memory by model, rung and phase in what cards of 4 and
    11 GB have, against what `tandem plan` predicts; steps by batch, images a second, compiled steps, text encoders.

    Needs no server, no model and no network. Exit code 1 when a model that was planned to fit did not, when none could
    be measured, or when the card failed; what was measured until then is written all the same.
    """
    for file in (json_file, markdown_file):
        if file is not None:
            check_writable(file)
    plan = _plan(models, only, quick)
    from serve.bench.gpu import measure
    from serve.bench.gpu_report import as_json, headline, markdown, tables

    with Console(stderr=True).status("") as status:
        began = time.monotonic()

        def tell(what: str) -> None:
            line = f"{time.monotonic() - began:4.0f} s: {what}"
            status.update(line)
            if not status.console.is_terminal:
                status.console.print(line, markup=False, highlight=False)

        report = measure(plan, tell)
    if json_file is not None:
        write(json.dumps(as_json(report), indent=2, default=str) + "\n", json_file)
    if markdown_file is not None:
        write(markdown(report), markdown_file)
    show(headline(report), tables(report))
    raise typer.Exit(0 if report.holds(plan.sections) else 1)


def _plan(models: str | None, only: str | None, quick: bool) -> Plan:
    """Raises OperatorError that names the option, or CUDA where there is none."""
    from serve.memory.shapes import published

    names = named(models, tuple(published()), _QUICK if quick else _MODELS, "--models")
    from serve.bench.gpu import SECTIONS, Plan
    from serve.bench.gpu_encoders import MEASURED
    from serve.devices import card_here, claim_device

    sections = named(only, SECTIONS, SECTIONS, "--only")
    card = card_here("auto")
    if card is None:
        raise OperatorError("bench gpu: there is no CUDA device here; nothing was measured")
    common = {"images": _QUICK_IMAGES, "lanes": _QUICK_LANES} if quick else {}
    return Plan(
        device=claim_device("cuda", 0.0, "bench gpu"),
        card=card,
        shapes={name: published()[name] for name in names},
        sections=frozenset(section for section in SECTIONS if section in sections),
        encoders=MEASURED,
        **common,  # type: ignore[arg-type]
    )
