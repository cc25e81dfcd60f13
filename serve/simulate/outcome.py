"""What became of every order, and what of the fleet's time was used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

SQUARE = frozenset({"queue", "held"})
"""What of Redis' time grows with traffic and fleet at once."""

FEW = 100
"""Orders whose slowest 5 % are chance."""


@dataclass(slots=True)
class Fate:
    """Of one order; seconds since the start. `began_s` is its first claim. `ended` says how: done, refused, expired,
    failed; empty where the simulation ended before it."""

    due_s: float
    owner: str
    model: str
    images: int
    began_s: float | None = None
    done_s: float | None = None
    ended: str = ""
    attempts: int = 0

    @property
    def latency_s(self) -> float | None:
        return None if self.done_s is None else self.done_s - self.due_s


@dataclass(frozen=True, slots=True)
class Moment:
    """The state at a moment: jobs that wait, images in hand, replicas that live."""

    at_s: float
    queued: int
    rows: int
    alive: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolUse:
    """`replicas` there were at the start, and at all times between `least` and `most`, which changed so many times:
    `course` is how many cards there were from each moment (seconds) on. `busy` is the share of the cards' time in
    steps; `hours` are those of all of them while the trace lasted, `cost` what they cost."""

    name: str
    model: str
    gpu_class: str
    replicas: int
    least: int
    most: int
    rung: str
    busy: float
    images: int
    lost: int
    changes: int
    hours: float
    cost: float
    course: Sequence[tuple[float, int]] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisUse:
    """`calls` of the job scripts by kind, and `busy_s`, the seconds that they keep one Redis busy; there also `queue`
    and `held`, what calls take longer for the jobs that wait and that are in hand, `held_at_most` where these are as
    many as an order looks at. `wake` is the telling of replicas, and their claims that got nothing, `poll` those of
    replicas that looked of themselves."""

    calls: Mapping[str, float]
    busy_s: Mapping[str, float]
    duration_s: float

    @property
    def share(self) -> float:
        """Of the time; above 1 it does not keep up."""
        return self.linear + self.square

    @property
    def linear(self) -> float:
        """The part that doubles with twice the traffic on twice the fleet."""
        return sum(busy for name, busy in self.busy_s.items() if name not in SQUARE) / self.duration_s

    @property
    def square(self) -> float:
        """The part that is four times as much then: more calls, each about more."""
        return sum(busy for name, busy in self.busy_s.items() if name in SQUARE) / self.duration_s

    @property
    def calls_per_s(self) -> float:
        return sum(self.calls.values()) / self.duration_s

    @property
    def growth(self) -> float:
        """How many times this traffic on as many times this fleet one Redis bears."""
        linear, square = self.linear, self.square
        if not square:
            return 1 / linear
        return (math.sqrt(linear * linear + 4 * square) - linear) / (2 * square)

    def of_shard(self, share: float, shards: int) -> float:
        """How busy the Redis of a shard is that has such a share of the orders and an equal part of the fleet."""
        by_fleet = self.busy_s.get("poll", 0.0) / self.duration_s
        return (self.linear - by_fleet) * share + self.square * share * share + by_fleet / shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`slices` is of how many equal parts of fleet and traffic this is one; its figures are those of the part, but for
    `redis`, which is that of a single Redis for all of it."""

    name: str
    duration_s: float
    end_s: float
    fates: Sequence[Fate]
    pools: Sequence[PoolUse]
    redis: RedisUse
    moments: Sequence[Moment] = field(default=())
    slices: int = 1
    took_s: float = 0.0

    @property
    def counts(self) -> Mapping[str, int]:
        """Orders by their end; `unfinished` are those without."""
        return Counter(fate.ended or "unfinished" for fate in self.fates)

    def latency_s(self, percent: float) -> float | None:
        """Of all orders that were due: one that was refused, expired or failed counts as never done. None where that
        many were not done."""
        done = np.sort([fate.latency_s for fate in self.fates if fate.latency_s is not None])
        rank = percent / 100 * (len(self.fates) - 1)
        low = int(rank)
        if rank > len(done) - 1 or not len(done):
            return None
        high = min(low + 1, len(done) - 1)
        return float(done[low] + (rank - low) * (done[high] - done[low]))

    def worst_p95_s(self, window_s: float) -> float | None:
        """That of the worst part of such a length, as `latency_s`: None where more than 5 % of a part were not done.
        Parts with fewer than FEW orders say nothing, unless all are such."""
        parts: dict[int, list[float]] = {}
        for fate in self.fates:
            taken = math.inf if fate.latency_s is None else fate.latency_s
            parts.setdefault(int(fate.due_s / window_s), []).append(taken)
        told = [sorted(each)[math.ceil(0.95 * len(each)) - 1] for each in parts.values() if len(each) >= FEW]
        worst = max(told, default=self.latency_s(95))
        return None if worst is None or math.isinf(worst) else worst

    @property
    def waiting_s(self) -> float | None:
        """Mean time until the first claim, of the jobs that had one."""
        waits = [fate.began_s - fate.due_s for fate in self.fates if fate.began_s is not None]
        return float(np.mean(waits)) if waits else None

    @property
    def images_per_s(self) -> float:
        """Over the time until the last was done."""
        return sum(fate.images for fate in self.fates if fate.ended == "done") / self.end_s

    @property
    def cost(self) -> float:
        """Of all cards, over the length of the trace; of all slices."""
        return self.slices * sum(pool.cost for pool in self.pools)
