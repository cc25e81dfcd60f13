"""What the command line shows while jobs run: one live bar a job, and the reports after them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from serve import client as api
from serve.cli.client import Client
from serve.client import Job
from serve.domain.jobs import JobState
from serve.errors import TandemError

PLACE_S = 1.0
"""Between two looks at a waiting job's place in the queue, which no event tells."""
_WITHDRAW_S = 10.0
"""Longest that whoever stops waiting waits for the order's answer, which has the id to cancel."""
COLORS = {JobState.SUCCEEDED: "green", JobState.FAILED: "red", JobState.EXPIRED: "red", JobState.CANCELLED: "yellow"}


@contextlib.contextmanager
def job_bars(console: Console) -> Iterator[Progress]:
    """Live bars for `run_job`; a terminal shows them moving, a file gets their last state."""
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(max_width=40, no_wrap=True)),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("[{task.fields[color]}]{task.fields[state]}", table_column=Column(no_wrap=True)),
        TimeElapsedColumn(),
    )
    bars = Progress(*columns, console=console)
    try:
        yield bars
    finally:
        if bars.tasks:
            bars.stop()


async def run_job(client: Client, order: Mapping[str, Any], label: str, bars: Progress) -> Job:
    """Queue a job, show its place in the queue and its steps, return it when it has ended. Whoever stops waiting
    cancels it on the server."""
    creating = asyncio.create_task(client.submit(**order))
    try:
        job = await asyncio.shield(creating)
        bars.start()
        line = _Line(bars, label, job)
        placing = asyncio.create_task(_keep_place(client, job.id, line))
        try:
            async for progress in client.follow(job.id):
                line.show(progress, progress.state.value)
        finally:
            placing.cancel()
        return await client.get(job.id)
    except BaseException:
        with contextlib.suppress(TandemError, TimeoutError):
            async with asyncio.timeout(_WITHDRAW_S):
                await client.cancel((await creating).id)
        raise


class _Line:
    """A job's bar."""

    def __init__(self, bars: Progress, label: str, job: Job) -> None:
        self._bars = bars
        self._bar = bars.add_task(label, total=job.steps, state="", color="cyan")
        self.show(job, place(job))

    def show(self, progress: api.Progress, words: str) -> None:
        self.state = progress.state
        color = COLORS.get(progress.state, "cyan")
        self._bars.update(self._bar, completed=progress.step, total=progress.steps, state=words, color=color)
        if progress.state.terminal:
            self._bars.stop_task(self._bar)


async def _keep_place(client: Client, job_id: str, line: _Line) -> None:
    """Tell a waiting job's place again and again: others move it, and no event of its own tells of that."""
    while True:
        await asyncio.sleep(PLACE_S)
        if line.state is JobState.QUEUED:
            with contextlib.suppress(TandemError):
                job = await client.get(job_id)
                if line.state is job.state:  # its events may have been faster than this answer
                    line.show(job, place(job))


def place(job: Job) -> str:
    """`3rd in the queue, about 12 s` of a job that waits; else its state."""
    if job.position is None or job.state is not JobState.QUEUED:
        return job.state.value
    return f"{ordinal(job.position)} in the queue" + ("" if job.eta_s is None else f", about {span(job.eta_s)}")


def ordinal(number: int) -> str:
    last = number % 10
    end = "th" if number // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(last, "th")
    return f"{number}{end}"


def span(seconds: float) -> str:
    """A time in one number: 12 s, 3 min, 2 h, 5 d."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def cache_line(job: Job) -> str:
    """Where the job's text came from, in words; empty if the server did not say."""
    cache = job.cache
    if cache is None:
        return ""
    return f"text units: {cache.memory} from memory, {cache.redis} from Redis, {cache.encoded} encoded"


def cut_lines(job: Job) -> list[str]:
    """One line for each text that did not fit into the encoder's row."""
    return [
        f"{cut.field} has {cut.tokens} tokens, {cut.limit} fit into {cut.encoder}; cut: {cut.text!r}"
        for cut in job.truncated
    ]
