"""`tandem bench soak`: thousands of images, and whether anything grows."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serve.cli.bench import check_writable, show, write
from serve.cli.extras import loadtest as part
from serve.cli.extras import want
from serve.cli.running import run
from serve.errors import OperatorError

_IMAGES, _QUICK_IMAGES = 10_000, 200
_RESULT_TTL_S, _QUICK_RESULT_TTL_S = 60.0, 5.0
_EVERY_S, _QUICK_EVERY_S = 5.0, 1.0
_JUDGED_AT_ONCE, _QUICK_JUDGED_AT_ONCE = 10, 40


def soak(
    images: Annotated[
        int | None, typer.Option(min=1, help="Pictures to order.", show_default="10000; with --quick 200")
    ] = None,
    users: Annotated[int, typer.Option(min=1, max=512, help="Orders under way at once.")] = 16,
    result_ttl: Annotated[
        float | None,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="`jobs.result_ttl_s` of the server: so long records and pictures live.",
            show_default="60; with --quick 5",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Fixes the orders.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute or two: too few images for memory.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw memory over images, as PNG.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON.")] = None,
) -> None:
    """Order thousands of small pictures over HTTP and watch the server: memory, descriptors and threads of every
    process, both Redis servers, the files; in the end nothing may have grown and nothing be left.

    A server of its own, records and pictures short-lived. Exit code 1 when a job failed or a bar is missed.
    """
    if json_file is not None:
        check_writable(json_file)
    if plot is not None:
        _check_drawable(plot)
    want("locust")
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (0,)
    plan = part("bench.soak:Plan")(
        images=images or (_QUICK_IMAGES if quick else _IMAGES),
        users=users,
        result_ttl_s=result_ttl or (_QUICK_RESULT_TTL_S if quick else _RESULT_TTL_S),
        every_s=_QUICK_EVERY_S if quick else _EVERY_S,
        judged_at_once=_QUICK_JUDGED_AT_ONCE if quick else _JUDGED_AT_ONCE,
        seed=seed,
        budget=part("servers:Budget")(cores=cores, torch_threads=max(1, len(cores) - 1)),
    )
    part("bench.soak:check")(plan)
    with telling() as tell:
        report = run(part("bench.soak:soak")(plan, tell))
    if json_file is not None:
        write(json.dumps(part("bench.soak_report:as_json")(report), indent=2) + "\n", json_file)
    if plot is not None:
        _draw(part("bench.soak_report:plot")(report), plot)
    show(part("bench.soak_report:headline")(report), part("bench.soak_report:tables")(report))
    raise typer.Exit(0 if part("bench.soak_report:passed")(report) else 1)


@contextlib.contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """What goes on now, with the time, on the screen; elsewhere a line each."""
    with Console(stderr=True).status("") as status:
        began = time.monotonic()

        def tell(what: str) -> None:
            line = f"{time.monotonic() - began:4.0f} s: {what}"
            status.update(line)
            if not status.console.is_terminal:
                status.console.print(line, markup=False, highlight=False)

        yield tell


def _check_drawable(file: Path) -> None:
    """As `check_writable`; and matplotlib is there."""
    want("matplotlib")
    there = file.exists()
    try:
        file.open("ab").close()
        if not there:
            file.unlink()
    except OSError as error:
        raise _undrawable(file, error) from None


def _draw(png: bytes, file: Path) -> None:
    try:
        file.write_bytes(png)
    except OSError as error:
        raise _undrawable(file, error) from None


def _undrawable(file: Path, error: OSError) -> OperatorError:
    return OperatorError(f"--plot {file}: {error.strerror}", "plot")
