"""What the command line shows while jobs run: one live bar a job, and the reports after them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from serve.cli.client import Client, RemoteJob
from serve.domain import JobState
from serve.errors import TandemError

_COLORS = {JobState.SUCCEEDED: "green", JobState.FAILED: "red", JobState.EXPIRED: "red", JobState.CANCELLED: "yellow"}


@contextlib.contextmanager
def job_bars(console: Console) -> Iterator[Progress]:
    """Live bars for `run_job`; a terminal shows them moving, a file gets their last state."""
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(max_width=40, no_wrap=True)),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("[{task.fields[color]}]{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    bars = Progress(*columns, console=console)
    try:
        yield bars
    finally:
        if bars.tasks:
            bars.stop()


async def run_job(client: Client, order: Mapping[str, Any], label: str, bars: Progress) -> RemoteJob:
    """Queue a job, show its steps, return it when it has ended. Whoever stops waiting cancels it on the server."""
    creating = asyncio.create_task(client.create(order))
    try:
        job = await asyncio.shield(creating)
        bars.start()
        bar = bars.add_task(label, total=job.steps, state=job.state.value, color="cyan")
        async for progress in client.follow(job.id):
            color = _COLORS.get(progress.state, "cyan")
            bars.update(bar, completed=progress.step, total=progress.steps, state=progress.state.value, color=color)
            if progress.state.terminal:
                bars.stop_task(bar)
        return await client.get(job.id)
    except BaseException:
        with contextlib.suppress(TandemError):
            await client.cancel((await creating).id)
        raise


def cache_line(job: RemoteJob) -> str:
    """Where the job's text came from, in words; empty if the server did not say."""
    cache = job.cache
    if cache is None:
        return ""
    return f"text units: {cache.memory} from memory, {cache.redis} from Redis, {cache.encoded} encoded"


def cut_lines(job: RemoteJob) -> list[str]:
    """One line for each text that did not fit into the encoder's row."""
    return [
        f"{cut.field} has {cut.tokens} tokens, {cut.limit} fit into {cut.encoder}; cut: {cut.text!r}"
        for cut in job.truncated
    ]
