"""The job store without its Redis: the very scripts, in a Lua interpreter, on a simulated clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lupa import luajit21

from serve.domain.orders import ImageRequest
from serve.jobs import scripts
from serve.jobs.connection import milliseconds
from serve.jobs.records import Want
from serve.jobs.terms import Hold
from serve.settings.stores import JobSettings
from serve.simulate.calls import StoreCalls

TABLES = Path(__file__).with_name("redis.lua")
"""What of Redis the scripts call."""
EPOCH_MS = 1_700_000_000_000
"""When a simulation begins, on the store's clock: its times have the digits that they have in a server."""


@dataclass(slots=True)
class _Order:
    """One that no script has heard of yet: when it came and as which, when it was claimed, what was said of it."""

    job_id: str
    number: int
    came_ms: float
    request: ImageRequest
    owner: str
    priority: str
    cost_ms: int
    replicas: int
    claimed_ms: float = 0.0


class SimulatedStore(StoreCalls):
    """A job that comes to an empty queue and is claimed before another comes was never one of several: between nobody
    and nobody the scripts have nothing to decide, and are spared. So is its end. They hear of such a job when it turns
    out to matter: when another one is queued behind it, when nobody wants it yet, when its worker is lost.

    Owns: one Lua state, with the keys of a Redis as tables; the orders that these do not know.
    """

    def __init__(self, settings: JobSettings) -> None:
        super().__init__(settings)
        self._lua = luajit21.LuaRuntime(unpack_returned_tuples=True)
        self._call_script = self._lua.execute(TABLES.read_text(encoding="utf-8"))
        self._redis = self._lua.globals().redis.call
        self._scripts = {
            name: self._lua.execute(f"return function() {source}\nend") for name, source in scripts.sources().items()
        }
        self._submitted = 0
        self._empty = True
        self._alone: _Order | None = None
        self._unheard: dict[str, _Order] = {}

    def submit(
        self,
        now_ms: float,
        job_id: str,
        request: ImageRequest,
        *,
        owner: str,
        priority: str,
        cost_ms: int,
        replicas: int,
    ) -> bool:
        self._submitted += 1
        order = _Order(job_id, self._submitted, now_ms, request, owner, priority, cost_ms, replicas)
        if self._empty and self._alone is None:
            self._alone = order  # an empty queue takes any job
            return True
        self._tell_alone()
        return self._tell(order)

    def claim(
        self, now_ms: float, worker: str, wants: Sequence[Want], *, idle: bool
    ) -> tuple[str, int, bool] | Hold | None:
        alone = self._alone
        if alone is not None and now_ms == alone.came_ms:
            asked = alone.request
            if any(
                not want.waited_s and want.model == asked.model and want.above < asked.pixels <= want.upto
                for want in wants
            ):
                alone.claimed_ms, self._alone = now_ms, None
                self._unheard[alone.job_id] = alone
                return alone.job_id, 1, True
            return Hold.UNFIT
        self._tell_alone()
        if self._empty:
            return None
        found = super().claim(now_ms, worker, wants, idle=idle)
        self._empty = isinstance(found, tuple) and found[2]
        return found

    def claimed(self, job_id: str) -> None:
        # Each order's ETA is read from all leases, and nobody asks for it here: `last_sign` alone leaves one.
        self._redis("ZREM", "tandem:leases", job_id)

    def last_sign(self, now_ms: float, job_id: str, fence: int) -> None:
        if (order := self._unheard.pop(job_id, None)) is not None:
            self._tell_claimed(order)
        super().last_sign(now_ms, job_id, fence)

    def settle(self, now_ms: float, job_id: str, fence: int) -> bool:
        if (order := self._unheard.pop(job_id, None)) is not None:
            return now_ms < order.claimed_ms + milliseconds(self._settings.timeout_s)
        return super().settle(now_ms, job_id, fence)

    def reap(self, now_ms: float) -> int:
        self._tell_alone()
        changed = super().reap(now_ms)
        self._empty = not self._redis("ZCARD", "tandem:queue")
        return changed

    def state(self, job_id: str) -> str | None:
        """Of the record; None where it is forgotten."""
        return self._redis("HGET", f"tandem:job:{job_id}", "state") or None

    def _tell_alone(self) -> None:
        order, self._alone = self._alone, None
        if order is not None:
            self._tell(order)

    def _tell(self, order: _Order) -> bool:
        """As the one that it was."""
        self._redis("SET", "tandem:sequence", str(order.number - 1))
        queued = super().submit(
            order.came_ms,
            order.job_id,
            order.request,
            owner=order.owner,
            priority=order.priority,
            cost_ms=order.cost_ms,
            replicas=order.replicas,
        )
        self._empty = self._empty and not queued
        return queued

    def _tell_claimed(self, order: _Order) -> None:
        """It is claimed as the only one of a model of its own, at no cost: whatever else is queued by now notices
        nothing."""
        empty, alias = self._empty, f"{order.request.model}/{order.job_id}"
        self._tell(replace(order, request=replace(order.request, model=alias)))
        self._redis("HSET", f"tandem:job:{order.job_id}", "cost", "0")
        super().claim(order.claimed_ms, "lost", [Want(alias, 0, order.request.pixels)], idle=True)
        self._redis("DEL", f"tandem:standby:{alias}")
        self._redis("HSET", f"tandem:job:{order.job_id}", "model", order.request.model, "cost", str(order.cost_ms))
        self._empty = empty

    def _run(self, name: str, now_ms: float, *args: str) -> Any:
        answer = self._call_script(self._scripts[name], EPOCH_MS + now_ms, *self._settings_args, *args)
        return None if answer is False else answer
