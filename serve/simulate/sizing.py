"""How many cards of which class a traffic wants, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from serve.costs import Costs
from serve.errors import OperatorError
from serve.jobs.terms import Crew
from serve.simulate.fleet import Fleet
from serve.simulate.outcome import Outcome
from serve.simulate.pools import plan_pools
from serve.simulate.scale import run
from serve.simulate.traffic import Traffic, busiest, enough_s

CLOSE = 0.02
"""Sizes are told apart to this share."""
PLENTY = 3.0
"""Times the replicas that the work alone wants: where these don't reach the time, waiting is not what takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """A pool between `least` and `most` cards over all of the trace, as the server's policy decides with the pool's
    `target_wait_s`, `idle_s` and cold start: 95 % of all orders are done in `p95_s`, in the worst minutes in `worst_s`
    (None where more than 5 % never are); its number changed so often, and an hour costs so much on average."""

    least: int
    most: int
    p95_s: float | None
    worst_s: float | None
    changes: int
    cost_per_hour: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A pool that draws all orders for its model alone. `replicas` is the least number that does so within the wanted
    time, None where none does, for the reason `why`. `cost_per_hour` is that of as many cards. `scaled` is what comes
    of no more of them than the work wants, where the pool lets their number change."""

    pool: str
    model: str
    gpu_class: str
    replicas: int | None
    p95_s: float | None = None
    busy: float = 0.0
    cost_per_hour: float = 0.0
    cost_per_1000: float = 0.0
    why: str = ""
    scaled: Scaled | None = None


def sizes(fleet: Fleet, traffic: Traffic, p95_s: float, most_orders: int, seed: int = 0) -> Iterator[Size]:
    """For each pool, those without replicas too, in the busiest minutes of the traffic. The queue has room for what
    comes in `p95_s`: that a bound of `jobs.max_queued` refuses more is another question."""
    for name, pool in fleet.pools.items():
        orders = [each for each in traffic.orders if each.request.model == pool.model]
        if orders:
            whole = Traffic(traffic.name, traffic.duration_s, orders)
            size = _Search(fleet, name, busiest(whole, _window_s(whole)), p95_s, most_orders, seed).size()
            yield replace(size, scaled=_scaled(fleet, size, whole, most_orders, seed))


class _Search:
    """Owns: what was simulated, by the number of replicas."""

    def __init__(self, fleet: Fleet, name: str, traffic: Traffic, p95_s: float, most_orders: int, seed: int) -> None:
        pool = fleet.pools[name].model_copy(update={"from_zero": False})
        room = math.ceil(2 * p95_s * len(traffic.orders) / traffic.duration_s)
        bounds = {"max_queued": max(fleet.job_settings().max_queued, room)}
        self._fleet = fleet.model_copy(update={"pools": {name: pool}, "jobs": fleet.jobs | bounds})
        self._name, self._traffic, self._p95_s = name, traffic, p95_s
        self._most_orders, self._seed = most_orders, seed
        self._found: dict[int, Outcome] = {}

    def size(self) -> Size:
        pool = self._fleet.pools[self._name]
        bare = Size(pool=self._name, model=pool.model, gpu_class=pool.gpu_class, replicas=None)
        try:
            least = self._least()
        except OperatorError as error:
            return _because(bare, error.message.removeprefix(f"pools.{self._name}: "))
        plenty = math.ceil(PLENTY * least) + 1
        if not self._enough(plenty):
            reached = self._at(plenty).latency_s(95)
            told = "more than 5 % of the orders are not drawn" if reached is None else f"{reached:.1f} s"
            return _because(bare, f"even {plenty} cards, which hardly wait: {told}")
        low, high = least - 1, plenty
        while high - low > max(1, CLOSE * high):
            middle = (low + high) // 2
            low, high = (low, middle) if self._enough(middle) else (middle, high)
        return self._told(bare, high)

    def _least(self) -> int:
        """As many as the work alone keeps busy. Raises OperatorError where the class does not hold an order."""
        planned = plan_pools(self._fleet.with_replicas({self._name: 1}))[self._name]
        costs, crew, work_ms, known = Costs(), Crew((planned.report,)), 0.0, {}
        for each in self._traffic.orders:
            asked = each.request
            if asked.pixels > planned.placement.max_pixels:
                raise OperatorError(f"its cards do not hold {asked.width} x {asked.height}", "fleet")
            key = asked.pixels, asked.lanes, asked.num_images, asked.num_inference_steps, asked.scheduler
            if key not in known:
                known[key] = costs.estimate(asked, crew).cost_ms
            work_ms += known[key]
        return max(1, math.floor(0.9 * work_ms / (1000 * self._traffic.duration_s)))

    def _enough(self, replicas: int) -> bool:
        p95 = self._at(replicas).latency_s(95)
        return p95 is not None and p95 <= self._p95_s

    def _at(self, replicas: int) -> Outcome:
        if replicas not in self._found:
            fleet = self._fleet.with_replicas({self._name: replicas})
            self._found[replicas] = run(fleet, self._traffic, self._most_orders, self._seed)
        return self._found[replicas]

    def _told(self, bare: Size, replicas: int) -> Size:
        found = self._at(replicas)
        per_hour = replicas * self._fleet.price_per_hour(bare.gpu_class)
        images = sum(fate.images for fate in found.fates if fate.ended == "done") * found.slices
        hours = self._traffic.duration_s / 3600
        return Size(
            pool=bare.pool,
            model=bare.model,
            gpu_class=bare.gpu_class,
            replicas=replicas,
            p95_s=found.latency_s(95),
            busy=found.pools[0].busy,
            cost_per_hour=per_hour,
            cost_per_1000=1000 * per_hour * hours / images if images else 0.0,
        )


def _because(bare: Size, why: str) -> Size:
    return Size(pool=bare.pool, model=bare.model, gpu_class=bare.gpu_class, replicas=None, why=why)


def _window_s(traffic: Traffic) -> float:
    return enough_s(traffic.duration_s, len(traffic.orders))


def _scaled(fleet: Fleet, size: Size, traffic: Traffic, most_orders: int, seed: int) -> Scaled | None:
    """With the cards of `size` at most, and the pool's least; None where the pool's number does not change."""
    pool, most = fleet.pools[size.pool], size.replicas
    if most is None or not pool.scales or pool.least >= most:
        return None
    alone = fleet.model_copy(update={"pools": {size.pool: pool.between(pool.least, most)}})
    found = run(alone, traffic, most_orders, seed)
    (use,) = found.pools
    return Scaled(
        least=pool.least,
        most=most,
        p95_s=found.latency_s(95),
        worst_s=found.worst_p95_s(_window_s(traffic)),
        changes=use.changes,
        cost_per_hour=found.cost / (traffic.duration_s / 3600),
    )
