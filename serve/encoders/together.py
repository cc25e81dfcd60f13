"""One round trip for what several tasks ask in the same turn of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

Answer = TypeVar("Answer")


class Together(Generic[Answer]):
    """Keys that are asked for in one turn of the event loop go into one call.

    The call goes on where who asked is cancelled, because others may wait for it: it must be a short one.
    """

    def __init__(
        self, call: Callable[[Sequence[str]], Coroutine[Any, Any, Answer]], calls: set[asyncio.Task[Any]]
    ) -> None:
        """`calls` is the owner's: the calls under way are there until they end."""
        self._call = call
        self._calls = calls
        self._keys: list[str] = []
        self._next: asyncio.Task[Answer] | None = None

    def ask(self, keys: Sequence[str]) -> asyncio.Task[Answer]:
        """The call that answers for `keys`, and for others; wait for it in `asyncio.shield`."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._run())
            self._calls.add(self._next)
            self._next.add_done_callback(self._calls.discard)
        self._keys += keys
        return self._next

    async def _run(self) -> Answer:
        keys, self._keys, self._next = self._keys, [], None
        return await self._call(keys)
