"""How many replicas a pool wants: a text encoder's by the tokens that wait, held by the work that is done; a
placement's by the predicted seconds of work in the job store.

Serve pickles this module by value into its controller, which calls the policy ten times a second: nothing here may
block, and nothing heavy may be imported.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingContext

from serve.scaling.demand import Place
from serve.scaling.steady import Steady
from serve.scaling.watch import StoreAt, watch

REPORT_S = 1.0
"""Seconds between the reports of a replica or handle to the controller."""
WINDOW_S = 5.0
"""Seconds over which the reports are averaged: one batch is no load."""
REQUEST_TOKENS = 154
"""Tokens of a request that no replica has yet: a prompt and a negative prompt of CLIP. The least that it may be."""
FULL = 0.8
"""Share of its time in forward passes at which a replica counts as fully used: beyond it, queues grow fast."""


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One replica, as it reports itself: tokens that wait or are being encoded, share of the time in forward passes,
    requests per second."""

    queued_tokens: float = 0.0
    busy: float = 0.0
    requests: float = 0.0


def desired_replicas(
    loads: Sequence[ReplicaLoad],
    *,
    waiting_requests: float,
    ongoing_requests: float,
    current: int,
    min_replicas: int,
    max_replicas: int,
    target_queue_tokens: int,
) -> int:
    """Replicas for the load of this moment; `steady` turns it into a decision.

    It grows so that each has `target_queue_tokens` to do. It shrinks only as far as the rest can carry the work:
    by queues alone, a pool with enough replicas looks idle, loses one, and grows again.
    """
    tokens = sum(load.queued_tokens for load in loads) + REQUEST_TOKENS * waiting_requests
    wanted = math.ceil(tokens / target_queue_tokens)
    if wanted < current:
        busy = sum(load.busy for load in loads)
        wanted = max(wanted, min(current, math.ceil(busy / FULL)))
    if not wanted and (ongoing_requests > 0 or any(load.requests > 0 for load in loads)):
        wanted = 1  # answered from its cache: a pool that somebody uses doesn't sleep
    return min(max(wanted, min_replicas), max_replicas)


class QueuedTokens:
    """The policy as Serve calls it.

    Owns: its memory of what was wanted.
    """

    def __init__(self, target_queue_tokens: int, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._target_queue_tokens = target_queue_tokens
        self._steady = Steady(idle_s, clock)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        current = context.target_num_replicas
        reports = context.aggregated_metrics or {}
        loads = [
            ReplicaLoad(
                **{field: reports[field].get(replica, 0.0) for field in ReplicaLoad.__slots__ if field in reports}
            )
            for replica in context.running_replicas
        ]
        wanted = desired_replicas(
            loads,
            waiting_requests=context.total_queued_requests or 0.0,
            ongoing_requests=context.total_num_requests,
            current=current,
            min_replicas=context.capacity_adjusted_min_replicas,
            max_replicas=context.capacity_adjusted_max_replicas,
            target_queue_tokens=self._target_queue_tokens,
        )
        if current and not context.running_replicas:
            wanted = max(
                wanted, 1
            )  # it has not been idle: it has not begun, and a T5 takes longer to load than `idle_s`
        return self._steady(wanted, current), {}


class BacklogSeconds:
    """The policy of a placement's diffusion replicas, as Serve calls it: by the predicted seconds of work in the job
    store, which its watch looks at. Nothing of Serve's own figures counts: no request goes through its handles.

    Owns: its memory of what was wanted.
    """

    def __init__(
        self,
        placement: str,
        places: Sequence[Mapping[str, Any]],
        store: Mapping[str, str],
        idle_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`places` are the fields of each `Place` of the application, `store` those of a `StoreAt`."""
        self._placement = placement
        self._watch = watch(StoreAt(**store), [Place(**each) for each in places])
        self._steady = Steady(idle_s, clock)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        current, seen = context.target_num_replicas, self._watch.seen()
        if seen is None:
            return current, {}
        wanted = seen.wanted[self._placement]
        if current and not context.running_replicas:
            wanted = max(wanted, 1)  # as a text encoder's
        return self._steady(wanted, current, seen.carried[self._placement]), {}
