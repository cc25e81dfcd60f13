"""`tandem learn`: a concept from one's own pictures, for prompts to use as `<NAME>`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve.cli.options import Assignments, ConfigFile, DataDir, load_settings


def learn(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Prompts will use it as <NAME>.")],
    images: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="PNG, JPEG or WebP. Where a.txt lies beside a.png, that is its caption; {} stands for the concept.",
        ),
    ],
    init: Annotated[str, typer.Option(metavar="WORDS", help="Words that come near it: where the vectors begin.")] = "",
    vectors: Annotated[
        int | None,
        typer.Option(min=1, help="How many words it takes.", show_default="as many tokens as --init has, or 1"),
    ] = None,
    style: Annotated[bool, typer.Option("--style", help="What the pictures share is how they are made.")] = False,
    caption: Annotated[
        list[str] | None,
        typer.Option(help="Said of the pictures, such as 'a photo of {}'; may be repeated.", show_default="many"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of learning.")] = 500,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Pictures of one step.")] = 4,
    rate: Annotated[
        float | None, typer.Option(min=0.0, help="Learning rate.", show_default="a share of the vocabulary's spread")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Fixes all that is left to chance.")] = 0,
    preview_every: Annotated[int, typer.Option(min=0, help="Steps from preview to preview; 0 draws none.")] = 100,
    preview: Annotated[
        list[str] | None,
        typer.Option(help="A prompt to preview, such as '{} on a beach'; may be repeated.", show_default="captions"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where it goes.", show_default="NAME.safetensors in the server's folder"),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write over a concept that is there.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Name of a model of the settings.", show_default="the first")
    ] = None,
    data_dir: DataDir = None,
    config_file: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """Learn a concept from pictures (textual inversion): the model stays as it is, a few new words come to it.

    Ctrl-C ends it and keeps what was learned. A server that runs on the same settings knows the concept at once.
    """
    settings = load_settings(config_file, assignments, {"data_dir": data_dir}).settings
    from serve.cli.learn_story import Order, story
    from serve.learning.learner import Wishes

    wishes = Wishes(steps=steps, batch=batch, seed=seed, rate=rate, init=init, vectors=vectors)
    order = Order(
        name=name,
        images=images,
        model=model,
        captions=tuple(caption or ()),
        style=style,
        preview_every=preview_every,
        previews=tuple(preview or ()),
        out=out,
        replace=replace,
    )
    raise typer.Exit(story(settings, order, wishes))
