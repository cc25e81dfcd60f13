"""The same orders through the stock pipeline and through the engine: saturated, open loop, and a short job behind long
ones. Text is encoded beforehand, for both."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from serve.bench.load import Latency, latency, open_loop
from serve.bench.stats import Spread, poisson_arrivals
from serve.bench.stock import StockPipeline
from serve.diffusion.engine import Engine, Rendered, Work
from serve.domain.conditioning import Schedule
from serve.domain.jobs import StepEvent
from serve.domain.orders import ImageRequest

USERS = 24
LOAD = 0.95
"""Of the stock pipeline's capacity."""
SHORT, LONG, LONG_JOBS = 4, 50, 8
"""Steps of the short job, steps of the long ones, how many of them."""

Texts = Mapping[ImageRequest, Schedule]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturated:
    """Images a second of the mixed work. `stock` is one at a time; `ratio` is how many seconds of the stock pipeline's
    work the engine does in one second, order by order, so that it does not matter which orders a window caught.
    Spreads are over windows that took turns."""

    users: int
    stock: Spread
    ratio: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop:
    """The same arrivals, at `LOAD` of the stock pipeline's capacity, through both."""

    stock: Latency
    engine: Latency


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortBehindLong:
    """Seconds, from the moment at which all were submitted. `alone_s` is when the last long job ends without the short
    one, `last_s` with it; `short_s` is when the short one ends, `first_long_s` the first long one. `own_s` is what the
    short job takes on an idle engine."""

    short_s: float
    own_s: float
    first_long_s: float
    last_s: float
    alone_s: float


class Drawers:
    """Sends an order to either side and waits for its image.

    Owns: the line in front of the engine.
    """

    def __init__(self, stock: StockPipeline, engine: Engine, texts: Texts, in_hand: int) -> None:
        """`in_hand` is how many images the engine is given at once; the others wait in line, as jobs do."""
        self._stock = stock
        self._engine = engine
        self._texts = texts
        self._places = asyncio.Semaphore(in_hand)
        self._runs = 0

    async def stock(self, order: ImageRequest) -> None:
        await self._stock.send(order, self._texts[order])

    async def engine(self, order: ImageRequest) -> None:
        async with self._places:
            await asyncio.wrap_future(self.submit(order))

    def submit(self, order: ImageRequest) -> Future[Rendered]:
        self._runs += 1
        text = self._texts.get(order) or next(
            text for known, text in self._texts.items() if known.prompt == order.prompt and known.guided == order.guided
        )
        return self._engine.submit(Work(f"bench-{self._runs}", order, text), _ignore)


async def measure_saturated(drawers: Drawers, orders: Sequence[ImageRequest], rounds: int) -> tuple[Saturated, float]:
    """Each round draws its part of the orders one at a time with the stock pipeline, then all of the round's again
    through the engine. Also gives the stock pipeline's capacity, images a second."""
    stock, ratios, drawn, spent_s = [], [], 0, 0.0
    share = len(orders) // rounds
    for number in range(rounds):
        part = orders[number * share : (number + 1) * share]
        costs = {}
        for order in part:
            began = time.perf_counter()
            await drawers.stock(order)
            costs[order] = time.perf_counter() - began
        took_s = sum(costs.values())
        drawn, spent_s = drawn + len(part), spent_s + took_s
        stock.append(len(part) / took_s)
        ratios.append(await _saturate(drawers, part, costs))
    return Saturated(users=USERS, stock=Spread.of(stock), ratio=Spread.of(ratios)), drawn / spent_s


async def _saturate(drawers: Drawers, orders: Sequence[ImageRequest], costs: Mapping[ImageRequest, float]) -> float:
    """Seconds of the stock pipeline's work that the engine does in a second while `USERS` orders are always under way.

    Twice through the orders. The first `USERS` answers warm up; what is under way at both ends of the window cancels.
    """
    line = iter([*orders, *orders])
    done: list[tuple[float, float]] = []

    async def user() -> None:
        for order in line:
            await drawers.engine(order)
            done.append((time.perf_counter(), costs[order]))

    async with asyncio.TaskGroup() as group:
        for _ in range(USERS):
            group.create_task(user())
    window = done[USERS - 1 : -USERS]
    return sum(cost for _, cost in window[1:]) / (window[-1][0] - window[0][0])


async def measure_open_loop(
    drawers: Drawers, orders: Sequence[ImageRequest], capacity: float, seconds: float, seed: int
) -> OpenLoop:
    """At least `seconds`, in whole passes over the orders: their mean cost is then the one that `capacity` is of.

    A queue at 95 % takes minutes to fill: a short run flatters the slower side.
    """
    rate = LOAD * capacity
    passes = math.ceil(seconds * rate / len(orders))
    arrivals = poisson_arrivals(rate, passes * len(orders) / rate, seed)
    line = [orders[index % len(orders)] for index in range(len(arrivals))]
    found = {}
    for name, send in (("one at a time", drawers.stock), ("engine", drawers.engine)):
        samples = await open_loop(lambda index, send=send: send(line[index]), arrivals)  # type: ignore[misc]
        found[name] = latency(name, LOAD, rate, samples)
    return OpenLoop(stock=found["one at a time"], engine=found["engine"])


async def measure_short_behind_long(drawers: Drawers, order: ImageRequest) -> ShortBehindLong:
    """`order` gives prompt, size and sampler."""
    longs = [replace(order, num_inference_steps=LONG, seed=seed) for seed in range(LONG_JOBS)]
    short = replace(order, num_inference_steps=SHORT, seed=LONG_JOBS)

    async def ends(line: Sequence[ImageRequest]) -> list[float]:
        began = time.perf_counter()

        async def draw(one: ImageRequest) -> float:
            await asyncio.wrap_future(drawers.submit(one))
            return time.perf_counter() - began

        return list(await asyncio.gather(*(draw(one) for one in line)))

    own = (await ends([short]))[0]
    alone = await ends(longs)
    both = await ends([*longs, short])
    return ShortBehindLong(
        short_s=both[-1], own_s=own, first_long_s=min(both[:-1]), last_s=max(both[:-1]), alone_s=max(alone)
    )


def _ignore(event: StepEvent) -> None:
    pass
