"""Many jobs step together, so their progress travels together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from serve.domain.jobs import JobState
from serve.jobs.records import Claim

Send = Callable[[Sequence[tuple[Claim, int, JobState]]], Awaitable[Sequence[bytes]]]


class Renewals:
    """Renewals that come in one turn of the event loop, or while one message is under way, go in the next as one.

    Owns: those that wait, and the task that sends them.
    """

    def __init__(self, send: Send) -> None:
        """`send` takes (claim, step, state) and answers each, in order; it raises TandemError for all of them."""
        self._send = send
        self._waiting: list[tuple[Claim, int, JobState, asyncio.Future[bytes]]] = []
        self._task: asyncio.Task[None] | None = None

    async def renew(self, claim: Claim, step: int, state: JobState) -> bytes:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.append((claim, step, state, answer))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._send_waiting())
        return await answer

    async def _send_waiting(self) -> None:
        while self._waiting:
            batch = [entry for entry in self._waiting if not entry[-1].done()]
            self._waiting = []
            if not batch:
                continue
            try:
                answers = await self._send([(claim, step, state) for claim, step, state, _ in batch])
            except Exception as error:  # noqa: BLE001  whatever it is, those who wait are told
                for *_, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (*_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
