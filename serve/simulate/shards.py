"""What it moves to part the tenants among several servers, each with a job Redis and an equal part of the fleet."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from serve.simulate.fleet import Fleet
from serve.simulate.outcome import Outcome
from serve.simulate.scale import part, run
from serve.simulate.traffic import Traffic, busiest, enough_s

NUMBERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The busiest of `number` shards: its share of the orders, how busy its Redis is over all of the trace, and in
    which time 95 % of its orders are done in the busiest minutes (None where fewer are)."""

    number: int
    share: float
    redis: float
    p95_s: float | None


def shards(
    fleet: Fleet, traffic: Traffic, whole: Outcome, most_orders: int, numbers: Sequence[int] = NUMBERS
) -> list[Shard]:
    """While each pool may have a replica for each shard. Tenants are parted by a hash of their name, so that a tenant
    who orders much stays one shard's."""
    found = []
    most = min(pool.most for pool in fleet.pools.values() if pool.most)
    rush = busiest(traffic, enough_s(traffic.duration_s, len(traffic.orders)))
    for number in (each for each in numbers if each <= most):
        places = {order.owner: _place(order.owner, number) for order in traffic.orders}
        (place, orders), *_ = Counter(places[order.owner] for order in traffic.orders).most_common(1)
        own = [order for order in rush.orders if places[order.owner] == place]
        outcome = run(part(fleet, number), Traffic(rush.name, rush.duration_s, own), most_orders) if own else None
        share = orders / len(traffic.orders)
        p95_s = None if outcome is None else outcome.latency_s(95)
        found.append(Shard(number=number, share=share, redis=whole.redis.of_shard(share, number), p95_s=p95_s))
    return found


def _place(owner: str, number: int) -> int:
    return int.from_bytes(hashlib.blake2b(owner.encode(), digest_size=8).digest(), "big") % number
