"""`tandem cache`: what the server keeps of its embeddings."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from serve.cli.cache_screen import cleared, shown_stats
from serve.cli.options import AsJson, Key, Url, client
from serve.cli.running import run
from serve.errors import OperatorError

cache = typer.Typer(help="Look after the server's embeddings.", no_args_is_help=True)


@cache.command("stats")
def cache_stats(
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """What is kept where, and how often it was of use."""
    run(shown_stats(client(url, key), as_json=as_json))


@cache.command("clear")
def cache_clear(
    url: Url = None,
    key: Key = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Remove every embedding. Nothing fails by it; texts are encoded again."""
    server = client(url, key)
    if not yes and not sys.stdin.isatty():
        raise OperatorError("cache clear: nobody can be asked here; say --yes", "yes")
    if not yes and not typer.confirm(f"Remove every embedding that {server.url} keeps?"):
        raise typer.Exit(1)
    run(cleared(server))


@cache.command("warm")
def cache_warm(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A prompt a line, or JSON lines with the fields of POST /v1/embeddings; - is standard input.",
        ),
    ],
    model: Annotated[str | None, typer.Option(help="Model for the lines that name none.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Prompts on their way at once.")] = 8,
    url: Url = None,
    key: Key = None,
) -> None:
    """Have the prompts of a file encoded now, so that no job waits for them later."""
    from serve.cli.warm import read_lines, warm

    lines = read_lines(file, model)
    raise typer.Exit(run(warm(client(url, key), lines, concurrency=concurrency)))
