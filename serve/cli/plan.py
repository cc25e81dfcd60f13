"""`tandem plan`: which models fit which cards, how, and how long an image takes there. Arithmetic alone: it asks for no
server, no GPU and no weights."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from serve.cli.options import AsJson, Assignments, ConfigFile, load_settings
from serve.settings.room import MOST_STEPS


def plan(
    models: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Published models, named ones of the settings, folders, checkpoints.",
            show_default="all published",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="GPU classes, the settings' too.", show_default="all built-in"),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Of the image.", show_default="each model's own")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MOST_STEPS, help="Of the image.", show_default="each model's own")
    ] = None,
    from_nvidia_smi: Annotated[
        bool, typer.Option("--from-nvidia-smi", help="The cards of this machine in place of classes.")
    ] = False,
    detail: Annotated[
        bool, typer.Option("--detail", help="Every cell in full: memory by phase, largest size, time.")
    ] = False,
    config_file: ConfigFile = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """What your cards can serve: for each model and card the first compromise that makes it fit, the memory, the time.

    Nothing is measured by it: docs/memory.md says what the figures are made of.
    """
    settings = load_settings(config_file, assignments, {}).settings
    from serve.cli.plan_rows import Asked, grid
    from serve.cli.plan_rows import as_json as row_as_json
    from serve.cli.plan_screen import show
    from serve.cli.plan_wanted import wanted_cards, wanted_models, wanted_size
    from serve.rungs import Rung

    width, height = wanted_size(size)
    own = settings.diffusion
    asked = Asked(
        width=width,
        height=height,
        steps=steps,
        dtype=own.fixed_dtype,
        best=own.best_rung,
        worst=Rung(own.worst_rung),
    )
    cards = wanted_cards(classes, settings.gpu_classes, from_nvidia_smi=from_nvidia_smi)
    wanted = wanted_models(models, settings.data_dir, (settings.model, *settings.models))
    found = grid(wanted, cards, asked)
    if as_json:
        print(json.dumps([row_as_json(cell) for row in found for cell in row], indent=2))
    else:
        show(found, detail=detail)
