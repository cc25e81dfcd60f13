"""What `tandem loadtest` shows: how the run goes, and what it came to."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadtest.driver import Progress
from loadtest.report.results import Result, Summary
from loadtest.report.thresholds import FIGURES, Verdict, shown
from loadtest.workload import Workload

_TOLD_EVERY_S = 10.0
"""Where no terminal can show a line that changes."""


class Screen:
    """A line on standard error that says what goes on; a terminal shows it changing.

    Owns: that line. A context manager.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._status = self._console.status("")
        self._began = time.monotonic()
        self._told_at = 0.0
        self._until_s: float | None = None

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._status.stop()

    def tell(self, what: str) -> None:
        """Of something new."""
        self._console.print(f"{time.monotonic() - self._began:4.0f} s: {what}", markup=False)
        self._status.update(Text(what))
        self._told_at = time.monotonic()

    def begin(self, workload: Workload, requests: int) -> None:
        how = f"{workload.users} under way at once" if workload.users else f"over {workload.duration_s:g} s"
        self.tell(f"{workload.name}: {requests} requests, {how}")

    def show(self, progress: Progress) -> None:
        if self._console.is_terminal:
            self._status.update(line(progress))
        elif time.monotonic() - self._told_at >= _TOLD_EVERY_S:
            self.tell(str(line(progress)))


def line(progress: Progress) -> Text:
    """A run so far, on one line."""
    rate = progress.done / progress.elapsed_s if progress.elapsed_s > 0 else 0.0
    parts = [
        f"{progress.elapsed_s:.0f} s",
        f"{rate:.2f}/s",
        f"sent {progress.sent}",
        f"done {progress.done}",
        f"refused {progress.refused}",
        f"failed {progress.failed}",
        f"under way {progress.under_way}",
    ]
    if progress.p50_s is not None:
        parts.append(f"P50 {shown(progress.p50_s, 's')}")
    return Text(" | ".join(parts), style="red" if progress.failed else "")


def print_figures(result: Result, figures: Summary, verdicts: Sequence[Verdict], page: Path) -> None:
    """What the run came to, whether that will do, and where to read more."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"{result.workload} on {result.target}: {figures.requests} requests"))
    table = Table("figure", "", "threshold", box=None, header_style="bold")
    bounds = {verdict.name: verdict for verdict in verdicts}
    for name, figure in FIGURES.items():
        value, verdict = figure.of(figures), bounds.get(name)
        if value is not None or verdict is not None:
            table.add_row(Text(name), Text(shown(value, figure.unit)), _bound(verdict))
    console.print(table)
    for what, count in figures.trouble.items():
        console.print(Text(f"{count} x {what}", style="yellow"))
    for doubt in figures.doubts:
        console.print(Text(doubt, style="yellow"))
    console.print(Text(str(page)))


def _bound(verdict: Verdict | None) -> Text:
    if verdict is None:
        return Text()
    told = f"{verdict.rule.replace('_', ' ')} {shown(verdict.bound, verdict.unit)}"
    return Text(f"{told}: {'met' if verdict.met else 'missed'}", style="green" if verdict.met else "red")


def here() -> str:
    """The machine that the load came from, in a line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{platform.system()} {platform.machine()}, {cores} cores, {memory:.0f} GiB, Python {platform.python_version()}"
    )
