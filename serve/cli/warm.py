"""What `tandem cache warm` does: have a file's prompts encoded before anybody orders them."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from serve.cli.client import Client
from serve.client import Encoded
from serve.client.answers import told
from serve.errors import ClientError, Forbidden, GenerationFailed, OperatorError, Unauthorized, Unavailable

PATIENCE_S = 60.0
"""How long a server that only says "later" is borne, counted from its last answer."""
_SHOWN_FAILURES = 20


@dataclass(frozen=True, slots=True)
class Line:
    """One order and where it stands in the file, counted from 1."""

    number: int
    order: Mapping[str, Any]


@dataclass(slots=True)
class _Tally:
    """What came of the lines so far."""

    done: int = 0
    memory: int = 0
    redis: int = 0
    encoded: int = 0
    cut: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    heard: float = field(default_factory=time.monotonic)

    def add(self, text: Encoded) -> None:
        self.done += 1
        self.memory += text.cache.memory
        self.redis += text.cache.redis
        self.encoded += text.cache.encoded
        self.cut += bool(text.truncated)
        self.heard = time.monotonic()

    def fail(self, line: int, reason: str) -> None:
        self.failures.append((line, reason))
        self.heard = time.monotonic()


async def warm(client: Client, lines: Sequence[Line], *, concurrency: int) -> int:
    """Exit code 0, or 1 when the server refused a line. The bar goes to stderr, the report to stdout.

    Raises OperatorError when the server is not there, Unavailable when it stays busy, Unauthorized or Forbidden where
    the key will not do.
    """
    tally, began = _Tally(), time.monotonic()
    async with client:
        with _bar(Console(stderr=True)) as bar:
            task = bar.add_task("encoding", total=len(lines), failed="")
            waiting = iter(lines)

            async def work() -> None:
                for line in waiting:
                    await _one(client, line, tally)
                    failed = f"{len(tally.failures)} failed" if tally.failures else ""
                    bar.update(task, advance=1, failed=failed)

            await _together([work() for _ in range(min(concurrency, len(lines)))])
    _report(tally, time.monotonic() - began)
    return 1 if tally.failures else 0


def read_lines(file: str, model: str | None) -> list[Line]:
    """The orders of a file, `-` for standard input: a prompt a line, or JSON lines if the first is an object.

    Empty lines and those that begin with `#` are skipped. `model` is for the lines that name none. Raises OperatorError
    that names the line.
    """
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise OperatorError(f"{file}: {error.strerror}", "file") from None
    name = "standard input" if file == "-" else file
    numbered = list(_written(name, data))
    if not numbered:
        raise OperatorError(f"{name}: holds no prompt", "file")
    is_json = numbered[0][1].startswith("{")
    orders = ((n, _parsed(f"{name}: line {n}", text) if is_json else {"prompt": text}) for n, text in numbered)
    return [Line(n, order if order.get("model") else {**order, "model": model}) for n, order in orders]


def _written(name: str, data: bytes) -> Iterator[tuple[int, str]]:
    """Number and text of each line that says something."""
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = raw.decode().strip()
        except UnicodeDecodeError:
            raise OperatorError(f"{name}: line {number}: not UTF-8", "file") from None
        if text and not text.startswith("#"):
            yield number, text


def _parsed(place: str, text: str) -> Mapping[str, Any]:
    try:
        order = json.loads(text)
    except json.JSONDecodeError as error:
        raise OperatorError(f"{place}: not JSON: {error.msg} at column {error.colno}", "file") from None
    except (ValueError, RecursionError):
        raise OperatorError(f"{place}: not JSON that can be read", "file") from None
    if not isinstance(order, dict) or not isinstance(order.get("prompt"), str):
        raise OperatorError(f'{place}: not an object with a "prompt"', "file")
    return order


async def _one(client: Client, line: Line, tally: _Tally) -> None:
    """A busy server is asked again when it said; a refusal is this line's and goes into the report."""
    while True:
        try:
            return tally.add(told(Encoded, await client.post("/v1/embeddings", {**line.order, "output": "report"})))
        except (Unauthorized, Forbidden):
            raise  # as it would be for every other line
        except (ClientError, GenerationFailed) as error:
            return tally.fail(line.number, error.message)
        except Unavailable as error:
            if time.monotonic() - tally.heard > PATIENCE_S:
                raise
            await asyncio.sleep(error.retry_after_s or 1.0)


async def _together(stories: Sequence[Any]) -> None:
    """Run them all; the first error ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            for story in stories:
                group.create_task(story)
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("[red]{task.fields[failed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _report(tally: _Tally, seconds: float) -> None:
    console = Console(highlight=False, markup=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("prompts", f"{tally.done:,}", f"{tally.done / seconds:.1f} a second" if seconds else "")
    table.add_row("units encoded", f"{tally.encoded:,}", "that no job has to wait for now")
    kept = f"memory {tally.memory:,}, Redis {tally.redis:,}"
    table.add_row("units from cache", f"{tally.memory + tally.redis:,}", kept)
    if tally.cut:
        table.add_row("prompts cut", f"{tally.cut:,}", "longer than the encoder's row")
    table.add_row("failed", f"{len(tally.failures):,}", "")
    table.add_row("seconds", f"{seconds:.1f}", "")
    console.print(table)
    for number, reason in sorted(tally.failures)[:_SHOWN_FAILURES]:
        console.print(f"line {number}: {reason}", style="red", soft_wrap=True)
    if len(tally.failures) > _SHOWN_FAILURES:
        console.print(f"and {len(tally.failures) - _SHOWN_FAILURES:,} more", style="red")
