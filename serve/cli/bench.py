"""`tandem bench`: how fast the product is on this machine. torch is imported when a measurement begins."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve.cli.child import ChildServer
from serve.cli.client import Client
from serve.cli.running import run
from serve.errors import OperatorError
from serve.settings.tree import ENV_PREFIX

if TYPE_CHECKING:
    from serve.bench.encode import Plan, Report

bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)

START_S = 300.0
"""Longest wait for a server to be ready."""
_POLL_S = 0.3
_FILE_COLUMNS = 120
_SECONDS, _QUICK_SECONDS = 10.0, 2.0
_QUICK = ("clip-l",)
_WITHOUT_SERVER = ("throughput", "pool", "precision", "hits")
_PRECISE = ("clip-l", "t5-small")
_SERVED = ("clip-l", "t5-small")
"""What a run without --full and --encoders measures in these sections."""


class BenchDevice(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


class BenchDtype(StrEnum):
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@bench.command()
def encode(
    encoders: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Encoders to measure.", show_default="all; with --quick clip-l"),
    ] = None,
    device: Annotated[BenchDevice | None, typer.Option(help="Where.", show_default="cuda if there is one")] = None,
    dtype: Annotated[
        BenchDtype | None, typer.Option(help="Precision.", show_default="float16 on a GPU, else float32")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads in process.", show_default="torch's choice")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Length of each open loop.", show_default="10; with --quick 2")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Fixes weights, texts and arrivals.")] = 0,
    only: Annotated[
        str | None, typer.Option(metavar="SECTION,...", help="Sections to run.", show_default="all")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute: few samples, and no server.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Precisions of all encoders, and all that a server can have.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON.")] = None,
) -> None:
    """Measure the encoder pool with random weights at real shapes: throughput and its limit, latency alone, under load
    and through the service, cache hits, precisions, the loss of Redis.

    Exit code 1 when a request failed.
    """
    length = seconds or (_QUICK_SECONDS if quick else _SECONDS)
    plan = _plan(encoders, only, quick, full, _place(device, dtype) | {"seconds": length, "seed": seed})
    if threads:
        from serve.devices import use_threads

        use_threads(threads)
    if json_file is not None:
        check_writable(json_file)
    report = run(_measure(plan))
    from serve.bench.report import as_json, headline, tables

    if json_file is not None:
        write(json.dumps(as_json(report), indent=2) + "\n", json_file)
    show(headline(report), tables(report))
    raise typer.Exit(1 if _any_failed(report) else 0)


def _plan(encoders: str | None, only: str | None, quick: bool, full: bool, common: Mapping[str, Any]) -> Plan:
    """`common` are the plan's own fields. Raises OperatorError that names the option."""
    from serve.bench.encode import SECTIONS, Plan
    from serve.bench.shapes import SHAPES, model_of

    names = named(encoders, tuple(SHAPES), _QUICK if quick else tuple(SHAPES), "--encoders")
    sections = named(only, SECTIONS, _WITHOUT_SERVER if quick else SECTIONS, "--only")
    known = [name for name in SHAPES if model_of(SHAPES[name])]
    servable = [name for name in names if name in known]
    if only and not servable and {"service", "loss"}.intersection(sections):
        raise OperatorError(
            f"--encoders: a server is measured with {', '.join(known)}, none of which is named", "encoders"
        )
    return Plan(
        shapes=tuple(SHAPES[name] for name in names),
        sections=frozenset(section for section in SECTIONS if section in sections),
        precise=frozenset(name for name in names if full or encoders or name in _PRECISE),
        served=frozenset(name for name in servable if full or encoders or name in _SERVED),
        **common,
    )


def _place(device: BenchDevice | None, dtype: BenchDtype | None) -> dict[str, str]:
    from serve.devices import best_device, claim_device

    place = claim_device(device or best_device(), 0.0, "--device").type
    return {"device": place, "dtype": dtype or ("float32" if place == "cpu" else "float16")}


def named(written: str | None, known: Sequence[str], default: Sequence[str], option: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in written.split(",")) if written is not None else tuple(default)
    if unknown := [name for name in names if name not in known]:
        raise OperatorError(f"{option}: {unknown[0] or 'nothing'} is not one of {', '.join(known)}", option)
    return tuple(dict.fromkeys(names))


async def _measure(plan: Plan) -> Report:
    from serve.bench.encode import measure

    with Console(stderr=True).status("") as status:
        began = time.monotonic()

        def tell(what: str) -> None:
            line = f"{time.monotonic() - began:4.0f} s: {what}"
            status.update(line)
            if not status.console.is_terminal:
                status.console.print(line, markup=False, highlight=False)

        return await measure(plan, own_server, tell)


@asynccontextmanager
async def own_server(model: Path, settings: Mapping[str, Mapping[str, object]]) -> AsyncIterator[str]:
    """A `tandem up` of this folder on a free port; everything that it writes lies beside the folder.

    It must not hear the operator's settings: the environment beats the file, and with it the bench would fill and
    lose a Redis that is not its own.
    """
    data_dir = model.with_name("server")
    data_dir.mkdir(exist_ok=True)
    file = data_dir / "settings.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML; a password is no option
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"--config": file, "--model": model, "--data-dir": data_dir, "--host": "127.0.0.1", "--port": port}
    arguments = [str(word) for option in options.items() for word in option]
    environ = {name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)}
    with ChildServer(arguments, data_dir / "tandem.log", environ) as server:
        async with Client(url := f"http://127.0.0.1:{port}") as client:
            deadline = time.monotonic() + START_S
            while not ((pools := await client.pools()) and all(pool.ready for pool in pools)):
                server.check()
                if time.monotonic() > deadline:
                    raise OperatorError(f"the server is not ready after {START_S:.0f} s")
                await asyncio.sleep(_POLL_S)
        yield url


def show(headline: str, tables: Iterable[Table]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_COLUMNS
    console.print(Text(headline), soft_wrap=True)
    for table in tables:
        console.print()
        console.print(table)


def check_writable(file: Path) -> None:
    """Not after ten minutes that it can't be written. What is in it stays until there is something to write."""
    there = file.exists()
    try:
        file.open("a").close()
        if not there:
            file.unlink()
    except OSError as error:
        raise OperatorError(f"--json {file}: {error.strerror}", "json") from None


def write(text: str, file: Path) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OperatorError(f"--json {file}: {error.strerror}", "json") from None


def _any_failed(report: Report) -> bool:
    loads = [load for pool in report.pools for load in pool.loads]
    loads += [load for service in report.services for load in service.loads]
    return any(load.failed for load in loads) or any(loss.failed for loss in report.losses)
