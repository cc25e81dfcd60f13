"""Requests on their way through `@serve.batch`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from serve.errors import BackendUnavailable, DeviceLost

T = TypeVar("T")


class Order(Generic[T]):
    """One request on its way through the door. `part` is the replica, as messages name it.

    Owns: the task that does its work, once it is through.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]], part: str) -> None:
        self._work = work
        self._part = part
        self._task: asyncio.Task[T] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._work())

    async def answer(self) -> T:
        """Of a started order. Whoever is cancelled here cancels the order."""
        assert self._task is not None
        try:
            return await self._task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise
            raise BackendUnavailable(f"{self._part} is stopping", None, 1.0) from None
        except DeviceLost as error:  # of this replica, not of the request: another may be asked
            raise BackendUnavailable(f"{error.message}; this replica is being replaced", None, 1.0) from None

    def withdraw(self) -> None:
        """Nobody waits for it any more. Nothing happens where it is done."""
        if self._task is not None:
            self._task.cancel()
