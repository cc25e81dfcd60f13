"""What a simulation comes to, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from serve.simulate.outcome import Outcome
from serve.simulate.shards import Shard
from serve.simulate.sizing import Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`sizes` is empty where no time was asked for."""

    outcome: Outcome
    shards: Sequence[Shard]
    sizes: Sequence[Size] = ()
    p95_s: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Seconds, shares and counts; None where there is nothing. Orders are those of one slice, cards, costs and
        Redis those of the whole."""
        found, redis = self.outcome, self.outcome.redis
        orders = len(found.fates)
        return {
            "trace": found.name,
            "duration_s": round(found.duration_s, 3),
            "slices": found.slices,
            "simulated_in_s": round(found.took_s, 2),
            "orders": {"all": orders, **found.counts},
            "latency_s": {f"p{each}": _rounded(found.latency_s(each)) for each in (50, 95, 99)},
            "waiting_s": _rounded(found.waiting_s),
            "images_per_s": _rounded(found.slices * found.images_per_s),
            "cost": round(found.cost, 4),
            "pools": [
                asdict(pool)
                | {"busy": round(pool.busy, 4), "course": [(at, found.slices * cards) for at, cards in pool.course]}
                | {name: found.slices * getattr(pool, name) for name in _OF_ALL}
                for pool in found.pools
            ],
            "redis": {
                "busy": _rounded(redis.share),
                "calls_per_s": _rounded(redis.calls_per_s),
                "busy_s": {name: _rounded(busy) for name, busy in redis.busy_s.items()},
                "saturates_at": {
                    "times": _rounded(redis.growth),
                    "orders_per_s": _rounded(redis.growth * found.slices * orders / found.duration_s),
                    "claims_per_s": _rounded(redis.growth * redis.calls.get("claim", 0.0) / found.duration_s),
                },
                "shards": [
                    {
                        "number": each.number,
                        "busiest_share": round(each.share, 4),
                        "busy": _rounded(each.redis),
                        "p95_s": _rounded(each.p95_s),
                    }
                    for each in self.shards
                ],
            },
            "sizes": [asdict(each) for each in self.sizes],
            "wanted_p95_s": self.p95_s,
        }


_OF_ALL = ("replicas", "least", "most", "images", "lost", "hours", "cost")
"""What of a pool is that of one slice."""


def _rounded(value: float | None) -> float | None:
    """To four figures."""
    return None if value is None else float(f"{value:.4g}")
