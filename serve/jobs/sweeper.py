"""The loop that gives lapsed leases back and ends what is overdue. Any number of processes may run it."""

from __future__ import annotations

import asyncio
import logging

from serve.errors import TandemError
from serve.jobs.store import JobStore

log = logging.getLogger(__name__)


async def sweep(store: JobStore, lease_s: float, interval_s: float = 1.0) -> None:
    """Reap until cancelled.

    Nobody could renew a lease while the store was away. So once it is back, and when this process is new, the workers
    have the time of one lease to speak first.
    """
    away = True
    while True:
        pause_s = interval_s
        try:
            await store.queue_depth()
            if away:
                away, pause_s = False, lease_s
            elif reaped := await store.reap():
                log.warning("%d jobs had lost their worker or their time", reaped)
        except TandemError as error:
            away = True
            log.warning("sweeping: %s", error.message)
        await asyncio.sleep(pause_s)
