"""`tandem bench compare`: the same orders at the same moments through Tandem and through what its users run today.

Every server has the same cores, the threads of torch that are best for it among those offered, and the same client.
Threads are counted where they draw: of Tandem's denoiser, whose text encoder and VAE have some beside it, and of all
that a baseline's process computes. What makes the budgets equal is the cores: all processes of a server are pinned to
them.

One server is up at a time, and starts anew in each round. All of them together would save the starts; but an idle Ray
is not idle (controller, raylet, agents: some percent of a core, and there are two of them here), so that the baselines
would pay for Tandem's processes and not the other way round. Servers take turns in an order that rotates from round to
round: what slows the machine down for minutes hits all alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtest.bench.compare_load import Order, Part, Show, offer, saturate
from loadtest.bench.compare_plan import LEAD_S, SETTLE_S, Capacity, Paced, Plan, Report, Stage
from loadtest.bench.compare_work import mean_weight
from loadtest.servers import TANDEM, Budget, Serving, serving
from loadtest.trace import Catalog, catalog_of, trace
from loadtest.workload import Closed, Workload, load
from serve.bench.machine import this_machine
from serve.errors import OperatorError
from serve.models import resolve
from serve.settings.pools import ModelSettings

WORKLOAD = "mixed"
STREAMS = 2000
"""`http.max_streams` and more: the bench is one caller, who waits for all that it ordered."""
_SATURATING = 1000
"""Orders of the mix, whose mean is the unit of work; saturated loads begin with the first."""


class Orders:
    """The mixed workload's orders. Owns: nothing; the seed fixes them."""

    def __init__(self, workload: Workload, catalog: Catalog, seed: int) -> None:
        self._workload, self._catalog, self._seed = workload, catalog, seed
        self.saturating = self.take(0, _SATURATING)
        self.unit = mean_weight(self.saturating)
        """The work of a mean order."""

    @classmethod
    def of(cls, seed: int) -> Orders:
        with tempfile.TemporaryDirectory(prefix="tandem-bench-") as scratch:
            return cls(load(WORKLOAD), catalog_of(resolve(ModelSettings(), Path(scratch))), seed)

    def take(self, number: int, count: int) -> Sequence[Order]:
        """`count` orders of round `number`; two rounds share none."""
        line = self._workload.model_copy(update={"arrivals": Closed(users=1, orders=count)})
        return [arrival.body for arrival in trace(line, self._seed * 1000 + number, self._catalog)]

    def parts(self, number: int, rates: Sequence[float], settle_s: float, count_s: float) -> list[Part]:
        """Orders of a round: at each rate (work a second) some that settle the queue, then those that count."""
        wanted = [(rate, seconds) for rate in rates for seconds in (settle_s, count_s)]
        counts = [max(1, round(rate * seconds)) for rate, seconds in wanted]
        line = iter(self.take(number, sum(counts)))
        return [
            Part(rate=rate, orders=[next(line) for _ in range(count)], counted=bool(place % 2))
            for place, ((rate, _), count) in enumerate(zip(wanted, counts, strict=True))
        ]


class Run:
    """Measures a plan, server by server. Owns: nothing beyond a server while it is up."""

    def __init__(self, plan: Plan, tell: Callable[[str], None], show: Show | None = None) -> None:
        """`tell` hears what comes next, `show` how the load goes."""
        self._plan, self._tell, self._show = plan, tell, show
        self._orders = Orders.of(plan.seed)
        self.report = Report(machine=this_machine(), plan=plan, settings=_settings(plan, overload=True))

    async def capacities(self) -> None:
        plan = self._plan
        for number, name in turns(plan.servers, plan.capacity_rounds):
            for threads in (self.report.threads(name),) if number else plan.threads:
                what = f"saturated, {name} with {threads} thread{'s' if threads > 1 else ''}"
                async with self._up(name, threads, what) as server:
                    line = self._orders.saturating[: plan.orders]
                    found = await saturate(server, line, self._orders.unit, self._show)
                    self.report.capacities.append(Capacity(server=name, threads=threads, round=number, saturated=found))

    async def paced(self) -> None:
        """The same arrivals through each; in the first round also each at its own pace, in all rounds where only that
        is asked for."""
        plan, report = self._plan, self.report
        same, own = ("same-rate" in plan.sections), ("own-rate" in plan.sections)
        for number, name in turns(plan.servers, plan.rounds):
            kinds = [TANDEM] if same or (own and name == TANDEM) else []
            if own and name != TANDEM and not (same and number):
                kinds.append(name)
            if not kinds:
                continue
            async with self._up(name, report.threads(name), f"round {number + 1}, {name}") as server:
                for of in kinds:
                    rate = plan.load * report.capacity(of)
                    self._tell(f"round {number + 1}, {name}: {plan.load:.0%} of the capacity of {of}")
                    (found,) = await offer(
                        server,
                        self._orders.parts(number + 1, [rate], LEAD_S, plan.seconds),
                        self._orders.unit,
                        seed=self._seed(number),
                        deadline_s=plan.deadline_s,
                        show=self._show,
                    )
                    report.paced.append(Paced(server=name, round=number, load=plan.load, of=of, offered=found))

    async def overload(self) -> None:
        plan, report = self._plan, self.report
        capacity = report.capacity(TANDEM)
        for name in plan.servers if plan.everyone else (TANDEM,):
            async with self._up(name, report.threads(name), f"overload, {name}", overload=True) as server:
                for number in range(plan.rounds):
                    self._tell(f"overload, {name}, round {number + 1}")
                    rates = [factor * capacity for factor in plan.factors]
                    found = await offer(
                        server,
                        self._orders.parts(plan.rounds + 1 + number, rates, SETTLE_S, plan.stage_s),
                        self._orders.unit,
                        seed=self._seed(plan.rounds + number),
                        deadline_s=plan.deadline_s,
                        show=self._show,
                    )
                    report.stages.extend(
                        Stage(server=name, round=number, factor=factor, offered=each)
                        for factor, each in zip(plan.factors, found, strict=True)
                    )

    def _seed(self, number: int) -> int:
        """Of the arrivals' times; each part of a round takes the next."""
        return 1000 * (1000 * self._plan.seed + number)

    @asynccontextmanager
    async def _up(self, name: str, threads: int, what: str, *, overload: bool = False) -> AsyncIterator[Serving]:
        self._tell(f"{what}: starting")
        plan, options = self._plan, list[str]()
        settings = _settings(plan, overload=overload) if name == TANDEM else {}
        if overload and name != TANDEM:
            options = ["--max-waiting", str(max_waiting(plan, self.report.capacity(name)))]
        budget = Budget(cores=plan.cores, torch_threads=threads)
        async with serving(name, budget=budget, settings=settings, options=options) as server:
            self._tell(what)
            yield server


async def measure(plan: Plan, tell: Callable[[str], None], show: Show | None = None) -> Report:
    """Measure all of the plan. The capacity always is: every rate is a part of one. Raises OperatorError for a server
    that does not start or draws nothing; once the capacities are known, what was measured until then is the report."""
    run = Run(plan, tell, show)
    await run.capacities()
    try:
        if plan.paced:
            await run.paced()
        if "overload" in plan.sections:
            await run.overload()
    except OperatorError as error:
        return replace(run.report, stopped=error.message)
    return run.report


def turns(servers: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Number of the round and server; each round begins with the next server."""
    for number in range(rounds):
        first = number % len(servers)
        yield from ((number, name) for name in (*servers[first:], *servers[:first]))


def max_waiting(plan: Plan, capacity: float) -> int:
    """A baseline's line under overload: as many orders as it draws in the time that Tandem lets one wait. With a line
    of its own length all that it drew would be late."""
    return max(1, round(plan.queued_s * capacity))


def _settings(plan: Plan, *, overload: bool) -> dict[str, Any]:
    """Tandem's, in groups: the caller's over the bench's own."""
    own: dict[str, dict[str, Any]] = {"http": {"max_streams": STREAMS, "max_connections": STREAMS}}
    if overload:
        own["jobs"] = {"max_queued_s": plan.queued_s}
    return {**own, **plan.settings, **{room: {**own[room], **plan.settings.get(room, {})} for room in own}}
