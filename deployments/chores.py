"""What an ingress replica does besides answering, even when no worker lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

from deployments.parts import Parts
from serve.api.job_schemas import webhook_body
from serve.domain.jobs import Job
from serve.errors import BackendUnavailable
from serve.jobs.gauges import Place, QueueGauges, tell_gauges
from serve.jobs.store import JobStore
from serve.jobs.sweeper import sweep
from serve.keys import KeyStore
from serve.placements import Fleet
from serve.settings.tree import Settings
from serve.webhooks import Deliverer

log = logging.getLogger(__name__)

TELL_AGAIN_S = 30.0
"""How often the settings of jobs are told, so that a job store that was away or emptied has them again."""
BEGIN_AGAIN_S = 1.0
"""When a chore that broke is begun again."""

Chore = Callable[[], Awaitable[None]]


class Chores:
    """Each goes on until they are closed, begun again where it ends or breaks.

    Owns: their tasks.
    """

    def __init__(self, settings: Settings, parts: Parts, fleet: Fleet, keys: KeyStore | None) -> None:
        chores = _chores(settings, parts, fleet, keys)
        self._tasks = [asyncio.create_task(kept_up(name, chore)) for name, chore in chores]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


def _chores(settings: Settings, parts: Parts, fleet: Fleet, keys: KeyStore | None) -> Iterator[tuple[str, Chore]]:
    """By name."""
    wanted = {Place(each.model, each.name, each.gpu_class): each.settings.least_replicas for each in fleet.placements}
    gauges = QueueGauges(parts.jobs, parts.metrics, wanted)
    yield "the sweeper", lambda: sweep(parts.jobs, parts.results, settings.jobs.lease_s)
    yield "telling the settings", lambda: tell_rules(parts.jobs)
    yield "telling the gauges", lambda: tell_gauges(gauges)
    if keys is not None and settings.keys.first is not None:
        yield "keeping the first key", partial(keep_first_key, keys, settings.keys.first.get_secret_value())
    if settings.webhooks.allowed_hosts:
        yield "calling webhooks", lambda: _deliverer(settings, parts).run()


async def kept_up(name: str, chore: Callable[[], Awaitable[None]]) -> None:
    """Do what is to go on until this is cancelled: a chore that ends or breaks is begun again."""
    while True:
        try:
            await chore()
            log.error("%s has ended, and is begun again", name)
        except Exception:
            log.exception("%s has broken, and is begun again", name)
        await asyncio.sleep(BEGIN_AGAIN_S)


async def tell_rules(jobs: JobStore) -> None:
    """Tell the settings of jobs now and then, until cancelled; first what Redis is not set up for."""
    for doubt in await jobs.doubts():
        log.warning("jobs.redis_url: %s: accepted jobs may be lost with this Redis", doubt)
    while True:
        try:
            await jobs.tell_rules()
        except BackendUnavailable as error:
            log.warning("the operator's commands can't be told the settings of jobs yet: %s", error.message)
        await asyncio.sleep(TELL_AGAIN_S)


async def keep_first_key(keys: KeyStore, token: str) -> None:
    """Make the settings' first key now and then, until cancelled: a job store that was away or emptied has it again."""
    told: str | None = None
    while True:
        pause_s = TELL_AGAIN_S
        try:
            doubt = await keys.make_first(token)
            if doubt != told and doubt is not None:
                log.warning("keys.first opens nothing: %s", doubt)
            told = doubt
        except BackendUnavailable:
            pause_s = BEGIN_AGAIN_S
        await asyncio.sleep(pause_s)


def _deliverer(settings: Settings, parts: Parts) -> Deliverer:
    root = settings.webhooks.public_url.rstrip("/")

    def body(job: Job) -> bytes:
        return webhook_body(job, root)

    return Deliverer(parts.jobs, settings.webhooks, body, parts.metrics)
