"""One server under one load: as much as it takes (saturated), a given rate, and rates that rise beyond what it can do.

Every load comes from a child process of its own (`loadtest.driver`), the same for all servers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import psutil

from loadtest.bench.compare_work import Window, faults, lost, saturated_rates, weights, window
from loadtest.driver import Progress, drive
from loadtest.processes import spent, usage
from loadtest.samples import Arrival, Outcome
from loadtest.servers import Serving
from serve.bench.stats import Spread, poisson_arrivals
from serve.errors import OperatorError

USERS = 24
GIVE_UP_S, PATIENT_S = 60.0, 300.0
"""After which a client goes away: in an open loop, and where orders only wait for each other."""
CLIENT = "client"
"""The role of the process that sends the load, beside those of `loadtest.processes`."""

Order = Mapping[str, Any]
Show = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturated:
    """`rate` is work a second while `users` orders are always under way, in images of the mix; its spread is of the
    window's pieces. `cpu_s` are CPU seconds for each image of the mix, by the role of the process, over the whole load,
    from its first order to its last picture. `lost` and `refused` are the orders without a picture. `others` is the
    share of the processors that other processes had meanwhile."""

    users: int
    rate: Spread
    cpu_s: Mapping[str, float]
    images: int
    refused: int
    lost: Mapping[str, int]
    faults: int
    others: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """An open loop of `rate` work a second, in images of the mix; what came of it once it was under way. `lost` (by
    reason) and `faults` are also those of the orders before it that settled the queue: no figure has these, but what
    goes wrong among them is the server's fault all the same."""

    rate: float
    window: Window
    lost: Mapping[str, int]
    faults: int
    others: float


class Meter:
    """What a server and its client take of the processors in a span, and what all others take. A context manager.

    A process that came and went meanwhile counts among the others, and so does what other guests of the host took.
    """

    def __init__(self, root: psutil.Process) -> None:
        self._root = root
        self.cpu_s: dict[str, float] = {}
        self.others = 0.0

    def __enter__(self) -> Self:
        self._processes, self._own, self._machine = self._look()
        return self

    def __exit__(self, *_: object) -> None:
        processes, own, (busy, whole) = self._look()
        self.cpu_s = spent(self._processes, processes) | {CLIENT: own - self._own}
        busy, whole = busy - self._machine[0], whole - self._machine[1]
        self.others = max(0.0, (busy - sum(self.cpu_s.values())) / whole) if whole else 0.0

    def _look(self) -> tuple[dict[int, Any], float, tuple[float, float]]:
        """The server's processes; CPU seconds of this process and of its ended children; those of all processors, busy
        and in all."""
        own, times = psutil.Process().cpu_times(), psutil.cpu_times()
        children = getattr(own, "children_user", 0.0) + getattr(own, "children_system", 0.0)
        # Linux counts a guest's time in the host's user time too.
        whole = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        busy = whole - times.idle - getattr(times, "iowait", 0.0)
        return usage(self._root, memory=False), own.user + own.system + children, (busy, whole)


async def saturate(
    server: Serving, orders: Sequence[Order], unit: float, show: Show | None = None, *, users: int = USERS
) -> Saturated:
    """`users` orders always under way until all are done: a slow machine takes longer, and tells as much. Raises
    OperatorError where too few pictures came."""
    work = weights(orders, unit)
    arrivals = _arrivals(server, orders, [0.0] * len(orders))
    with Meter(server.root) as meter:
        samples = await drive(server.url, arrivals, users=users, give_up_s=PATIENT_S, on_progress=show)
    try:
        rate, pieces = saturated_rates(samples, work, users)
    except ValueError as error:
        raise OperatorError(f"{server.name}: {error} (without one: {lost(samples) or 'none'})") from None
    done = [work[sample.index] for sample in samples if sample.outcome is Outcome.DONE]
    return Saturated(
        users=users,
        rate=Spread(median=rate, low=min(pieces), high=max(pieces), count=len(pieces)),
        cpu_s={role: cpu_s / sum(done) for role, cpu_s in meter.cpu_s.items()},
        images=len(done),
        refused=sum(sample.outcome is Outcome.REFUSED for sample in samples),
        lost=lost(samples),
        faults=faults(samples),
        others=meter.others,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Of an open loop: these orders at random times (Poisson), in just the time in which they are `rate` work a second:
    no part is offered more than another because its orders happen to be long. One that is not `counted` settles the
    queue at the rate of the next."""

    rate: float
    orders: Sequence[Order]
    counted: bool


async def offer(
    server: Serving,
    parts: Sequence[Part],
    unit: float,
    *,
    seed: int,
    deadline_s: float,
    show: Show | None = None,
) -> list[Offered]:
    """One open loop, part after part, and what came of those that count.

    Without a pause between: no part finds a server with empty queues behind one that filled them, and nothing that a
    part left in a queue is credited to it afterwards.
    """
    line = [order for part in parts for order in part.orders]
    work = weights(line, unit)
    spans = [sum(weights(part.orders, unit)) / part.rate for part in parts]
    begins = [0.0, *accumulate(spans)]
    due = [
        begin + time
        for number, (begin, span, part) in enumerate(zip(begins, spans, parts, strict=False))
        for time in poisson_arrivals(len(part.orders) / span, span, seed + number)
    ]
    with Meter(server.root) as meter:
        samples = await drive(server.url, _arrivals(server, line, due), give_up_s=GIVE_UP_S, on_progress=show)
    found, since_s = list[Offered](), 0.0
    for begin, span, part in zip(begins, spans, parts, strict=False):
        if part.counted:
            end = begin + span
            due_there = [one for one in samples if since_s <= one.due_s < end]
            found.append(
                Offered(
                    rate=part.rate,
                    window=window(samples, work, begin, end, deadline_s),
                    lost=lost(due_there),
                    faults=faults(due_there),
                    others=meter.others,
                )
            )
            since_s = end
    return found


def _arrivals(server: Serving, orders: Sequence[Order], due: Sequence[float]) -> list[Arrival]:
    return [
        Arrival(index=index, due_s=due_s, dialect=server.dialect, body=order)
        for index, (order, due_s) in enumerate(zip(orders, due, strict=True))
    ]
