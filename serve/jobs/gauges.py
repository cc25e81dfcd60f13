"""What the operator is shown of the queue, its Redis and the workers: gauges that every ingress replica tells alike.

Each is what the job store said a moment ago, so that of several processes any is right, and the largest is taken. One
pass over the queue every few seconds: no request pays for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from serve.errors import BackendUnavailable
from serve.jobs.base import UNFINISHED_STATES
from serve.jobs.store import JobStore
from serve.jobs.terms import Unfinished
from serve.telemetry.metrics import Metrics

TELL_S = 5.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model is drawn."""

    model: str
    placement: str
    gpu_class: str | None


class QueueGauges:
    """A model without jobs and a placement without replicas are told as 0, not left out: "none" is no "not known".

    Owns: which of them there are, as far as it has heard.
    """

    def __init__(self, store: JobStore, metrics: Metrics, wanted: Mapping[Place, int]) -> None:
        """`wanted` are the fewest replicas of the settings; the store may know other places, of another version's."""
        self._store = store
        self._metrics = metrics
        self._wanted = wanted
        self._places = set(wanted)
        self._models = {place.model for place in wanted}

    async def tell(self) -> None:
        """Raises BackendUnavailable."""
        unfinished = {each.model: each for each in await self._store.unfinished()}
        self._models |= unfinished.keys()
        crews = {model: await self._store.crew(model) for model in self._models}
        replicas = Counter(
            Place(each.model, each.placement, each.gpu_class) for crew in crews.values() for each in crew.reports
        )
        self._places |= replicas.keys()
        for place in self._places:
            self._tell_place("tandem_replicas", place, replicas[place])
        for place, number in self._wanted.items():
            self._tell_place("tandem_replicas_wanted", place, number)
        for model, crew in crews.items():
            its = unfinished.get(model, Unfinished(model=model, states={}, cost_ms=0, oldest_ms=0))
            for state in UNFINISHED_STATES:
                self._metrics.set("tandem_unfinished_jobs", its.states.get(state, 0), model=model, state=state)
            self._metrics.set("tandem_queue_age_seconds", its.oldest_ms / 1000, model=model)
            backlog_s = crew.pace * its.cost_ms / max(1, len(crew.reports)) / 1000
            self._metrics.set("tandem_backlog_seconds", backlog_s, model=model)
        memory = await self._store.memory()
        if memory is not None:
            self._metrics.set("tandem_job_store_memory_bytes", memory.used)
            if memory.limit:
                self._metrics.set("tandem_job_store_memory_limit_bytes", memory.limit)

    def _tell_place(self, metric: str, place: Place, number: int) -> None:
        self._metrics.set(metric, number, model=place.model, placement=place.placement, gpu_class=place.gpu_class or "")


async def tell_gauges(gauges: QueueGauges, interval_s: float = TELL_S) -> None:
    """Tell them until cancelled. While the store is away they are not told, and fade; the sweeper says why."""
    while True:
        with contextlib.suppress(BackendUnavailable):
            await gauges.tell()
        await asyncio.sleep(interval_s)
