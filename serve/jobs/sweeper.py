"""The loop that gives lapsed leases back and ends what is overdue. Any number of processes may run it."""

from __future__ import annotations

import asyncio
import logging

from serve.errors import TandemError
from serve.jobs.store import JobStore

log = logging.getLogger(__name__)


async def sweep(store: JobStore, interval_s: float = 1.0) -> None:
    """Reap until cancelled. A store that does not answer is tried again at the next turn."""
    while True:
        try:
            reaped = await store.reap()
            if reaped:
                log.warning("%d jobs had lost their worker or their time", reaped)
        except TandemError as error:
            log.warning("sweeping: %s", error.message)
        await asyncio.sleep(interval_s)
