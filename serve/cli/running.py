"""Running a command's story to its end, whatever ends it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

import typer

T = TypeVar("T")


def run(story: Coroutine[Any, Any, T]) -> T:
    """Run to the end. SIGTERM and SIGHUP cancel it as Ctrl-C does, so that it can end what it started."""

    async def main() -> T:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, task.cancel)
        return await story

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        raise typer.Exit(143) from None
