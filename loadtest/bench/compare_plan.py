"""What `tandem bench compare` measures, and what it found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, Literal, get_args

from loadtest.bench.compare_load import Offered, Saturated
from loadtest.servers import NAMES, TANDEM
from serve.bench.machine import Machine

Section = Literal["capacity", "same-rate", "own-rate", "overload"]
SECTIONS: tuple[Section, ...] = get_args(Section)
FACTORS = (0.8, 1.0, 1.2, 5.0)
PEAK = 1.2
"""Up to this multiple of the capacity is looked for the best goodput."""
LEAD_S, SETTLE_S = 5.0, 4.0
"""Of an open loop, and of each stage of the overload: it brings the queue to the length of that rate, and counts for
nothing."""
_START_S: Mapping[str, float] = {TANDEM: 30.0, "ray-batch": 12.0}
_QUICK_START_S, _CLIENT_S, _DRAIN_S = 6.0, 3.0, 5.0
"""What a server's start, a client's start and the end of a load take, about."""
_GUESS = 4.5
"""Images a second, to say how long a run takes before anything is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`threads` are offered to each server. `orders` is how many a saturated load has, `seconds` the length of an open
    loop without its first `LEAD_S`. `load` is of Tandem's capacity. `queued_s` is Tandem's `jobs.max_queued_s` under
    overload: what it accepts must be drawn within `deadline_s`. `everyone` sends the overload to the baselines too.
    `settings` are Tandem's, in groups."""

    servers: tuple[str, ...] = NAMES
    threads: tuple[int, ...] = (1, 2)
    cores: tuple[int, ...]
    sections: frozenset[Section] = frozenset(SECTIONS)
    rounds: int = 5
    capacity_rounds: int = 3
    orders: int = 84
    seconds: float = 15.0
    load: float = 0.8
    factors: tuple[float, ...] = FACTORS
    deadline_s: float = 10.0
    queued_s: float = 3.5
    everyone: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def stage_s(self) -> float:
        """The length of each stage of the overload without its first `SETTLE_S`."""
        return max(6.0, 0.4 * self.seconds)

    @property
    def paced(self) -> bool:
        return bool(self.sections & {"same-rate", "own-rate"})

    @property
    def about_s(self) -> float:
        """How long the run takes, roughly."""
        starts_s = [_START_S.get(name, _QUICK_START_S) for name in self.servers]
        load_s = _CLIENT_S + _DRAIN_S
        loop_s = load_s + LEAD_S + self.seconds
        fill_s = sum(starts_s) + len(starts_s) * (_CLIENT_S + self.orders / _GUESS)  # its end is among the orders
        whole = (len(self.threads) + self.capacity_rounds - 1) * fill_s
        if self.paced:
            whole += self.rounds * (sum(starts_s) + len(starts_s) * loop_s)
        if {"same-rate", "own-rate"} <= self.sections:
            whole += (len(starts_s) - 1) * loop_s
        if "overload" in self.sections:
            climb_s = load_s + self.deadline_s + len(self.factors) * (SETTLE_S + self.stage_s)
            whole += sum(starts_s if self.everyone else (_START_S[TANDEM],))
            whole += (len(starts_s) if self.everyone else 1) * self.rounds * climb_s
        return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    server: str
    threads: int
    round: int
    saturated: Saturated


@dataclass(frozen=True, slots=True, kw_only=True)
class Paced:
    """One server's open loop. `load` is of the capacity of `of`: Tandem, or the server itself."""

    server: str
    round: int
    load: float
    of: str
    offered: Offered


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A server's stage at `factor` times Tandem's capacity."""

    server: str
    round: int
    factor: float
    offered: Offered


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that was measured; rates are work a second in images of the mix. `settings` are Tandem's under
    overload. `stopped` is why the run ended early, empty where it did not."""

    machine: Machine
    plan: Plan
    settings: Mapping[str, Any]
    capacities: list[Capacity] = field(default_factory=list)
    paced: list[Paced] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    stopped: str = ""

    def threads(self, server: str) -> int:
        """With which the server was fastest."""
        found = [one for one in self.capacities if one.server == server and not one.round]
        return max(found, key=lambda one: one.saturated.rate.median).threads

    def saturated(self, server: str) -> list[Saturated]:
        """By round, with the threads that are best for it."""
        best = self.threads(server)
        return [one.saturated for one in self.capacities if (one.server, one.threads) == (server, best)]

    def capacity(self, server: str) -> float:
        return median(one.rate.median for one in self.saturated(server))

    @property
    def baselines(self) -> tuple[str, ...]:
        return tuple(name for name in self.plan.servers if name != TANDEM)

    @property
    def other_work(self) -> float | None:
        """The mean share of the processors that other processes had while loads ran."""
        return shares(self.capacities, self.paced, self.stages, mean=fmean)

    @property
    def faults(self) -> int:
        offered = [*(one.offered for one in self.paced), *(one.offered for one in self.stages)]
        return sum(one.saturated.faults for one in self.capacities) + sum(one.faults for one in offered)


def shares(
    *measured: Iterable[Capacity | Paced | Stage], mean: Callable[[Iterable[float]], float] = median
) -> float | None:
    """What other processes had of the processors, over these loads. None for none."""
    found = [
        (one.saturated if isinstance(one, Capacity) else one.offered).others for group in measured for one in group
    ]
    return mean(found) if found else None


def own_cores() -> tuple[int, ...]:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))
