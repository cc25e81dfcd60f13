"""`tandem bench simulate`: the simulation of `tandem simulate` held against a server that is here.

One server draws. What the simulation has to know of it comes from orders that are in no figure: its capacity is
measured, which also has it step batches of every size, then an open loop gives the times around the steps. Its
replica's report gives the step times, as it tells them to whoever predicts waiting times in a server. Then other orders
are sent, and the same ones simulated: every second of them says how fast the machine is just then, the rest is
compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pydantic import SecretStr

from loadtest.bench.calibration_fit import HELD, Compared, Overheads, compared, fleet_of, lines_of, overheads, paced
from loadtest.capacity import capacity
from loadtest.driver import drive
from loadtest.processes import Outside
from loadtest.samples import Arrival, Sample
from loadtest.servers import TANDEM, Budget, Serving, serving
from loadtest.trace import Catalog, fetch_catalog, trace
from loadtest.workload import Poisson, Workload, load
from serve.bench.machine import Machine, this_machine
from serve.embedded import running_url
from serve.errors import OperatorError
from serve.jobs.store import JobStore
from serve.jobs.terms import WorkerReport
from serve.settings.stores import JobSettings
from serve.simulate.fleet import Fleet
from serve.simulate.traffic import Line
from serve.telemetry.metrics import InProcessMetrics

WORKLOAD = "mixed"
MODEL = "shapes"
LEARNING_LOAD = 0.6
GIVE_UP_S = 300.0
BAR = 0.15
"""What a percentile may be off by, as a share of the measured one."""
_ANY_QUEUE = {"jobs": {"max_queued": 100_000, "max_queued_s": 1e6}}
"""An order that is refused could not be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`loads` are what is compared, each for `seconds`, as multiples of the capacity; `learning_s` is how long the
    orders come that the simulation learns from."""

    loads: Sequence[float]
    seconds: float
    learning_s: float
    seed: int
    budget: Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`capacity` is in orders a second; `fleets` are what was simulated, `lines` the traces, by load, as `tandem
    simulate` reads them. `other_work` is the share of the processors that belonged to neither the server nor this
    command."""

    machine: Machine
    plan: Plan
    capacity: float
    overheads: Overheads
    fleets: Sequence[Fleet]
    compared: Sequence[Compared]
    other_work: float | None = None
    lines: Sequence[Sequence[Line]] = field(default=(), repr=False)

    @property
    def within(self) -> bool:
        """Whether every percentile is within BAR of the measured one."""
        return all(abs(error) <= BAR for each in self.compared for error in each.errors.values())


async def measure(plan: Plan, tell: Callable[[str], None]) -> Report:
    """`tell` hears what comes next. Raises OperatorError."""
    workload = load(WORKLOAD).model_copy(update={"dialects": {"wait": 1.0}, "give_up_s": GIVE_UP_S})
    tell("starting a server")
    with Outside() as outside:
        async with serving(TANDEM, budget=plan.budget, settings=_ANY_QUEUE, model=MODEL) as server:
            report = await _Run(plan, workload, server, await fetch_catalog(server.url), tell).report()
    return replace(report, other_work=outside.share)


@dataclass(frozen=True)
class _Run:
    plan: Plan
    workload: Workload
    server: Serving
    catalog: Catalog
    tell: Callable[[str], None]

    async def report(self) -> Report:
        self.tell("measuring the capacity")
        most = await capacity(self.server.url, self.workload, self.catalog, self.plan.seed, None)
        self.tell(f"{most:.2f} orders a second; learning from an open loop at {LEARNING_LOAD:g} times as many")
        _, learnt = await self._sent(LEARNING_LOAD * most, self.plan.learning_s, self.plan.seed + 1)
        found = overheads(learnt)
        reported = fleet_of(await self._told(), found, MODEL)
        shape, fleets, results, lines = reported.shape("here"), [], [], []
        for number, part in enumerate(self.plan.loads):
            self.tell(f"comparing at {part:g} times the capacity, {self.plan.seconds:g} s")
            arrivals, samples = await self._sent(part * most, self.plan.seconds, self.plan.seed + 2 + number)
            fleet, pace = paced(reported, shape, arrivals, samples)
            results.append(compared(fleet, shape, arrivals, samples, part, self.plan.seconds, pace, HELD))
            fleets.append(fleet)
            lines.append(lines_of(arrivals))
        return Report(
            machine=this_machine(),
            plan=self.plan,
            capacity=most,
            overheads=found,
            fleets=fleets,
            compared=results,
            lines=lines,
        )

    async def _sent(self, rate: float, seconds: float, seed: int) -> tuple[Sequence[Arrival], Sequence[Sample]]:
        """An open loop to its end. Two seeds share no order."""
        own = self.workload.model_copy(update={"arrivals": Poisson(rate=rate), "duration_s": seconds})
        arrivals = trace(own, seed, self.catalog)
        return arrivals, await drive(self.server.url, arrivals, give_up_s=GIVE_UP_S)

    async def _told(self) -> WorkerReport:
        """What the replica says of itself by now."""
        url = running_url(self.server.data_dir)
        if url is None:
            raise OperatorError("calibration: the server's Redis is not found")
        store = JobStore(JobSettings(redis_url=SecretStr(url)), InProcessMetrics())
        try:
            (report,) = (await store.crew(next(iter(self.catalog)))).reports
        finally:
            await store.close()
        return report
