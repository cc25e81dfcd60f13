"""What a job costs Redis: commands by name and round trips, by the way in which the client waits, and how it grows with
the steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import redis

from loadtest.bench.service_load import body_of, until_ready
from loadtest.driver import drive
from loadtest.samples import Arrival, Outcome
from serve.domain.orders import ImageRequest
from serve.errors import OperatorError

DIALECTS = ("wait", "events", "poll")
STEPS = (4, 50)
SERVERS = ("jobs", "cache")
_OURS = ("info", "hello", "client|setinfo", "client", "auth", "ping", "select")
"""Commands by which this module looks, and those of new connections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """What one Redis has had so far: `calls` by command, those inside of scripts too; `trips` are reads from its
    clients' sockets, so that a pipeline is one and what a script does is none."""

    at_s: float
    calls: Mapping[str, float]
    trips: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A second, of a server that nobody asks for anything."""

    calls: Mapping[str, float]
    trips: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCost:
    """One job's, by server (`SERVERS`): the mean over `jobs`, one after another, less what the idle server does in that
    time. A command that comes by the clock, not by the job, can so be a little below 0."""

    dialect: str
    steps: int
    jobs: int
    failed: int
    calls: Mapping[str, Mapping[str, float]]
    trips: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisCosts:
    idle: Mapping[str, Rate]
    costs: tuple[JobCost, ...]

    def growth(self, dialect: str) -> float:
        """Round trips of all servers for one step more."""
        by_steps = {one.steps: sum(one.trips.values()) for one in self.costs if one.dialect == dialect}
        few, many = min(by_steps), max(by_steps)
        return (by_steps[many] - by_steps[few]) / (many - few) if many > few else 0.0


class Watch:
    """Looks at the counters of several Redis servers. Owns: a connection to each, kept open, so that looking adds one
    round trip, which is not counted."""

    def __init__(self, urls: Mapping[str, str]) -> None:
        self._clients = {name: redis.Redis.from_url(url, socket_timeout=5.0) for name, url in urls.items()}

    def __enter__(self) -> Self:
        self.look()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for client in self._clients.values():
            client.close()

    def look(self) -> dict[str, Count]:
        """Raises OperatorError."""
        try:
            return {name: _count(client.info("everything")) for name, client in self._clients.items()}
        except redis.RedisError as error:
            raise OperatorError(f"Redis does not answer: {error}") from None


async def measure_redis(
    url: str, watch: Watch, order: ImageRequest, *, jobs: int, idle_s: float, steps: Sequence[int] = STEPS
) -> RedisCosts:
    """`order` gives all but the steps and the seed; its text is in the caches. Jobs come one after another."""
    await drive(url, _arrivals(order, DIALECTS[0], 1), users=1)
    before = await asyncio.to_thread(watch.look)
    await asyncio.sleep(idle_s)
    after = await asyncio.to_thread(watch.look)
    idle = {name: rate(before[name], after[name]) for name in before}
    costs = []
    for dialect in DIALECTS:
        for each in steps:
            arrivals = _arrivals(replace(order, num_inference_steps=each), dialect, jobs)
            await until_ready(url)
            before = await asyncio.to_thread(watch.look)
            samples = await drive(url, arrivals, users=1)
            after = await asyncio.to_thread(watch.look)
            done = sum(sample.outcome is Outcome.DONE for sample in samples)
            costs.append(cost(dialect, each, done, jobs - done, before, after, idle))
    return RedisCosts(idle=idle, costs=tuple(costs))


def rate(before: Count, after: Count) -> Rate:
    """Raises ValueError for two looks at one moment."""
    seconds = after.at_s - before.at_s
    if seconds <= 0:
        raise ValueError("no rate without time")
    calls, trips = _grown(before, after)
    return Rate(calls={name: count / seconds for name, count in calls.items()}, trips=trips / seconds)


def cost(
    dialect: str,
    steps: int,
    done: int,
    failed: int,
    before: Mapping[str, Count],
    after: Mapping[str, Count],
    idle: Mapping[str, Rate],
) -> JobCost:
    calls: dict[str, dict[str, float]] = {}
    trips: dict[str, float] = {}
    for name, earlier in before.items():
        seconds = after[name].at_s - earlier.at_s
        grown, reads = _grown(earlier, after[name])
        own = idle[name]
        calls[name] = {
            command: (count - own.calls.get(command, 0.0) * seconds) / max(1, done) for command, count in grown.items()
        }
        trips[name] = (reads - own.trips * seconds) / max(1, done)
    return JobCost(dialect=dialect, steps=steps, jobs=done, failed=failed, calls=calls, trips=trips)


def _grown(before: Count, after: Count) -> tuple[dict[str, float], float]:
    """Without the look itself."""
    calls = {
        command: count - before.calls.get(command, 0.0)
        for command, count in after.calls.items()
        if command not in _OURS and count > before.calls.get(command, 0.0)
    }
    return calls, after.trips - before.trips - 1


def _count(info: Mapping[str, Any]) -> Count:
    calls = {
        name.removeprefix("cmdstat_"): float(told["calls"])
        for name, told in info.items()
        if name.startswith("cmdstat_")
    }
    return Count(at_s=time.monotonic(), calls=calls, trips=float(info["total_reads_processed"]))


def _arrivals(order: ImageRequest, dialect: str, jobs: int) -> list[Arrival]:
    return [
        Arrival(index=index, due_s=0.0, dialect=dialect, body=body_of(replace(order, seed=order.seed + index)))
        for index in range(jobs)
    ]
