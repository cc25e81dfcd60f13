"""What orders cost a replica, as the server predicts it from what its replicas report."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

from serve.costs import Costs
from serve.domain.orders import ImageRequest
from serve.jobs.terms import Crew
from serve.simulate.pools import PoolPlan


class Prices:
    """Owns: what was predicted, by what it depends on."""

    def __init__(self, pools: Mapping[str, PoolPlan]) -> None:
        self._costs, self._crews = Costs(), _crews(pools)
        self._known: dict[tuple[object, ...], int] = {}

    def cost_ms(self, asked: ImageRequest) -> int:
        size = asked.width, asked.height, asked.lanes, asked.num_images
        key = asked.model, *size, asked.num_inference_steps, asked.scheduler
        if key not in self._known:
            self._known[key] = self._costs.estimate(asked, self._crews[asked.model]).cost_ms
        return self._known[key]


def _crews(pools: Mapping[str, PoolPlan]) -> Mapping[str, Crew]:
    """By model, what its replicas report: each pool as often as its share of them says."""
    crews = {}
    for model in {pool.placement.model for pool in pools.values()}:
        own = [pool for pool in pools.values() if pool.placement.model == model]
        common = gcd(*(pool.about.most for pool in own))
        crews[model] = Crew(tuple(pool.report for pool in own for _ in range(pool.about.most // common)))
    return crews
