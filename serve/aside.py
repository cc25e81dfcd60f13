"""Texts are read on the event loop, long ones beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LONG = 1024
"""Characters from which on reading takes milliseconds, a tenth of a second for the longest: nobody else waits for
that. A shorter text is read before a thread would have begun."""


async def read_aside(characters: int, read: Callable[[], T]) -> T:
    """What `read` returns, or raises, for texts of so many characters. It may run in another thread."""
    return read() if characters < LONG else await asyncio.to_thread(read)
