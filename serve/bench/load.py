"""Load on anything that answers requests: arrivals on a clock (open loop), and as much as it takes (saturation)."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from serve.bench.stats import Percentiles

Send = Callable[[int], Awaitable[object]]
"""Sends request number i and returns when it is answered; raises what went wrong."""

GIVE_UP_S = 60.0
"""A request that is not answered after this time has failed."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: when it was due, seconds after the start; how long from then until its answer; what went wrong."""

    due: float
    seconds: float
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Answers at `rate` requests a second, `load` of the capacity. `seconds` is of those that were answered, from the
    time at which the request was due; None if none was. `failed` counts the others, by reason."""

    what: str
    load: float
    rate: float
    seconds: Percentiles | None
    failed: Mapping[str, int]


async def open_loop(send: Send, arrivals: Sequence[float]) -> list[Sample]:
    """Send request i at `arrivals[i]` seconds from now, whether the earlier ones are answered or not.

    Latency counts from that time, also where this process was late to send: else a stall would hide the requests that
    it kept from being sent (https://www.infoq.com/presentations/latency-response-time/).
    """
    began = time.perf_counter()

    async def request(index: int, due: float) -> Sample:
        error = None
        try:
            async with asyncio.timeout(GIVE_UP_S):
                await send(index)
        except Exception as failure:  # noqa: BLE001 -- whatever it is, it is counted and named in the report
            error = f"{type(failure).__name__}: {failure}"[:200]
        return Sample(due, time.perf_counter() - began - due, error)

    async with asyncio.TaskGroup() as group:
        tasks = []
        for index, due in enumerate(arrivals):
            if (wait := due - (time.perf_counter() - began)) > 0:
                await asyncio.sleep(wait)
            tasks.append(group.create_task(request(index, due)))
    return [task.result() for task in tasks]


async def saturate(send: Send, concurrency: int, seconds: float) -> float:
    """Answers a second while `concurrency` requests are always under way.

    Counted from one answer to another, because answers come in batches: those after the first `concurrency`, which
    warm up, until `seconds` have passed and as many again are there. Raises what `send` raises.
    """
    done: list[float] = []
    began = time.perf_counter()

    async def user(first: int) -> None:
        index = first
        while len(done) < 3 * concurrency or time.perf_counter() - began < seconds:
            await send(index)
            done.append(time.perf_counter())
            index += concurrency

    async with asyncio.TaskGroup() as group:
        for first in range(concurrency):
            group.create_task(user(first))
    return steady_rate(done[concurrency - 1 : -concurrency or None])


def steady_rate(times: Sequence[float]) -> float:
    """Answers a second between the first and the last of these times, the first not counted. Raises ValueError."""
    if len(times) < 2 or times[-1] <= times[0]:
        raise ValueError("no rate from answers that came all at once")
    return (len(times) - 1) / (times[-1] - times[0])


def latency(what: str, load: float, rate: float, samples: Sequence[Sample]) -> Latency:
    answered = [sample.seconds for sample in samples if sample.error is None]
    failed = Counter(sample.error for sample in samples if sample.error is not None)
    return Latency(
        what=what, load=load, rate=rate, seconds=Percentiles.of(answered) if answered else None, failed=dict(failed)
    )
