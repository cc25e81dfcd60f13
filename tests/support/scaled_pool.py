"""Placements whose replicas are scaled as the server scales them, on a clock of whole seconds: no Ray, no Redis."""

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serve.scaling.demand import Band, Place, carried, desired
from serve.scaling.rates import Rates
from serve.scaling.steady import Steady


@dataclass
class Job:
    """`left_s` of a replica's time."""

    pixels: int
    left_s: float
    came_at: int


@dataclass
class Pool:
    """`starting` has when each replica that was ordered will be there. `starts` are the replicas that were ordered in
    all, `turns` the times that a pool which grew shrinks, or the other way round."""

    place: Place
    steady: Steady
    running: list[Job | None] = field(default_factory=list)
    starting: list[int] = field(default_factory=list)
    leaving: list[Job] = field(default_factory=list)
    starts: int = 0
    turns: int = 0
    grew: bool = False
    most: int = 0
    replica_s: int = 0

    @property
    def ordered(self) -> int:
        return len(self.running) + len(self.starting)

    def scale(self, wanted: int, now: int, start_s: int) -> None:
        if wanted != self.ordered:
            self.turns += self.grew is not (wanted > self.ordered)
            self.grew = wanted > self.ordered
        self.starts += max(0, wanted - self.ordered)
        while self.ordered < wanted:
            self.starting.append(now + start_s)
        while self.ordered > wanted:
            if self.starting:
                self.starting.pop()
            elif (job := self.running.pop()) is not None:
                self.leaving.append(job)  # it drains
        self.most = max(self.most, self.ordered)


@dataclass
class Story:
    """What a trace came to: `waits` are seconds from each order to its claim."""

    pools: Mapping[str, Pool]
    waits: Sequence[int]

    def p95_wait(self) -> int:
        return sorted(self.waits)[int(0.95 * len(self.waits))] if self.waits else 0


def run(
    places: Sequence[Place],
    orders: Mapping[int, Sequence[tuple[int, float]]],
    seconds: int,
    *,
    start_s: int = 30,
    idle_s: float = 300.0,
) -> Story:
    """`orders` are by second: (pixels, seconds of a replica's time) each. Each replica draws one job at a time, and a
    new one begins after `start_s`."""
    now = 0
    bounds = sorted({place.max_pixels for place in places})
    pools = {place.name: Pool(place, Steady(idle_s, lambda: float(now))) for place in places}
    for pool in pools.values():
        pool.running += [None] * pool.place.min_replicas
    queue: deque[Job] = deque()
    rates, waits = Rates(), []
    for now in range(seconds):
        if not (now in orders or queue or any(pool.ordered or pool.leaving for pool in pools.values())):
            continue  # everybody sleeps
        arrived = dict.fromkeys(range(len(bounds)), 0.0)
        for pixels, cost_s in orders.get(now, ()):
            queue.append(Job(pixels, cost_s, now))
            arrived[_band(bounds, pixels)] += 1000 * cost_s
        rates.add(float(now), arrived)
        held = [job for pool in pools.values() for job in (*pool.running, *pool.leaving) if job is not None]
        bands = {places[0].model: _bands(bounds, queue, held, rates)}
        wanted, kept = desired(places, bands), carried(places, bands)
        for name, pool in pools.items():
            pool.scale(pool.steady(wanted[name], pool.ordered, kept[name]), now, start_s)
            _draw(pool, queue, now, waits)
    assert not queue, "the trace's end leaves work"
    return Story(pools, waits)


def orders_at(rate_per_s: Mapping[int, float], cost_s: float, seed: int = 0, pixels: int = 64) -> dict[int, list]:
    """Poisson arrivals at a rate by second."""
    lots, orders = random.Random(seed), {}
    for second, rate in rate_per_s.items():
        number, left = 0, lots.expovariate(1.0)
        while left < rate:
            number, left = number + 1, left + lots.expovariate(1.0)
        if number:
            orders[second] = [(pixels, cost_s)] * number
    return orders


def _draw(pool: Pool, queue: deque[Job], now: int, waits: list[int]) -> None:
    pool.running += [None for due in pool.starting if due <= now]
    pool.starting = [due for due in pool.starting if due > now]
    for place, job in enumerate(pool.running):
        left_s = 1.0
        while left_s > 0:
            if job is None:
                job = next((each for each in queue if each.pixels <= pool.place.max_pixels), None)
                if job is None:
                    break
                queue.remove(job)
                waits.append(now - job.came_at)
            spent = min(left_s, job.left_s)
            job.left_s, left_s = job.left_s - spent, left_s - spent
            if job.left_s <= 0:
                job = None
        pool.running[place] = job
    for job in pool.leaving:
        job.left_s -= 1.0
    pool.leaving = [job for job in pool.leaving if job.left_s > 0]
    pool.replica_s += pool.ordered + len(pool.leaving)


def _band(bounds: Sequence[int], pixels: int) -> int:
    return next(n for n, bound in enumerate(bounds) if pixels <= bound)


def _bands(bounds: Sequence[int], queue: Sequence[Job], held: Sequence[Job], rates: Rates) -> list[Band]:
    queued_s, held_s, jobs = [0.0] * len(bounds), [0.0] * len(bounds), [0] * len(bounds)
    for part, told in ((queue, queued_s), (held, held_s)):
        for job in part:
            n = _band(bounds, job.pixels)
            told[n] += job.left_s
            jobs[n] += 1
    return [
        Band(above, bound, 1000 * queued_s[n], 1000 * held_s[n], jobs[n], rates.of(n))
        for n, (above, bound) in enumerate(zip([0, *bounds], bounds, strict=False))
    ]
