"""A queued job's text, encoded while the job waits."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from serve.domain.text import EncodeUnit, Tier
from serve.encoders.cache import EmbeddingCache
from serve.errors import TandemError
from serve.jobs.store import JobStore
from serve.lately import Lately

log = logging.getLogger(__name__)

PREPARED_S, _PREPARED = 60.0, 20_000
"""For so long texts that were encoded ahead, the latest so many, are taken to be kept still. Where one was evicted, the
replica that claims the job has it encoded."""

Prepare = Callable[[Sequence[EncodeUnit]], Awaitable[Sequence[Tier]]]
"""Has units encoded and kept where the replica that claims the job will find them; where each came from."""


class Ahead:
    """Has the units of queued jobs prepared. Failure costs time only: the replica that claims the job asks again.

    Owns: the tasks that wait for the pools, and what was prepared lately.
    """

    def __init__(self, jobs: JobStore, prepare: Prepare, embeddings: EmbeddingCache | None) -> None:
        """`embeddings` is this process's cache, which says whether a text that was prepared is kept where all find it;
        without it each text is prepared anew."""
        self._jobs = jobs
        self._prepare = prepare
        self._embeddings = embeddings
        self._prepared: Lately[tuple[int, str]] = Lately(PREPARED_S, _PREPARED)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, job_id: str, units: Sequence[EncodeUnit]) -> None:
        if wanted := [unit for unit in units if not self._is_prepared(unit)]:
            task = self._tasks[job_id] = asyncio.create_task(self._encode(job_id, wanted))
            task.add_done_callback(lambda _: self._tasks.pop(job_id, None))

    def cancel(self, job_id: str) -> None:
        """Nobody waits for the job any more."""
        if task := self._tasks.get(job_id):
            task.cancel()

    def close(self) -> None:
        """The text of queued jobs is left to the replicas that claim them."""
        for task in self._tasks.values():
            task.cancel()

    def _is_prepared(self, unit: EncodeUnit) -> bool:
        known = self._embeddings
        return known is not None and known.shared(unit) and (known.cleared, unit.key) in self._prepared

    async def _encode(self, job_id: str, units: Sequence[EncodeUnit]) -> None:
        try:
            started = time.monotonic()
            tiers = await self._prepare(units)
            if self._embeddings is not None:
                for unit in filter(self._embeddings.shared, units):
                    self._prepared.note((self._embeddings.cleared, unit.key))
            told = {unit.key: tier for unit, tier in zip(units, tiers, strict=True)}
            await self._jobs.note_ahead(job_id, told, time.monotonic() - started)
        except TandemError as error:
            log.warning("text of job %s could not be encoded ahead: %s", job_id, error.message)
