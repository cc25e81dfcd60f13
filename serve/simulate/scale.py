"""Fleets too large to be simulated whole: an equal part of the fleet with an equal part of the traffic."""

from __future__ import annotations

import math

from serve.simulate.fleet import Fleet
from serve.simulate.fleet_parts import Pool
from serve.simulate.outcome import Outcome
from serve.simulate.traffic import Traffic, thinned
from serve.simulate.world import simulate

LEAST_REPLICAS = 8
"""Of each pool in a slice: fewer would wait longer for each other than those of the whole do."""


def run(fleet: Fleet, traffic: Traffic, most_orders: int, seed: int = 0) -> Outcome:
    """Simulate, in as many slices as it takes to have no more than `most_orders` in one, while each pool has
    LEAST_REPLICAS in it. Waiting in a slice is no shorter than in the whole: fewer replicas share fluctuations."""
    slices = slices_of(fleet, traffic, most_orders)
    if slices == 1:
        return simulate(fleet, traffic, seed)
    return simulate(part(fleet, slices), thinned(traffic, 1 / slices, seed), seed, slices)


def slices_of(fleet: Fleet, traffic: Traffic, most_orders: int) -> int:
    wanted = math.ceil(len(traffic.orders) / most_orders)
    pools = [pool for pool in fleet.pools.values() if pool.most]
    room = min(pool.most for pool in pools) // LEAST_REPLICAS
    kept = [pool.least for pool in pools if pool.scales and pool.least]  # a slice keeps a replica awake where all do
    return max(1, min([wanted, room, *kept]))


def part(fleet: Fleet, slices: int) -> Fleet:
    """One of so many, with its share of the places in the queue."""
    queued = max(1, round(fleet.job_settings().max_queued / slices))
    pools = {name: _part(pool, slices) for name, pool in fleet.pools.items()}
    return fleet.model_copy(update={"pools": pools, "jobs": fleet.jobs | {"max_queued": queued}})


def _part(pool: Pool, slices: int) -> Pool:
    replicas, least, most = (
        max(min(1, number), round(number / slices)) for number in (pool.replicas, pool.least, pool.most)
    )
    if not pool.scales:
        return pool.at(replicas)
    return pool.model_copy(update={"replicas": replicas, "min_replicas": least, "max_replicas": most})
