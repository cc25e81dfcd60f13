"""What the cache of forward passes is worth: forwards by how texts repeat, and latency with and without it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.bench.cache_meter import Counts, Meter
from loadtest.bench.cache_paired import Paired, PairedPlan, Serve, measure_paired
from loadtest.driver import drive
from loadtest.prompts import Wording
from loadtest.samples import Arrival, Outcome, Sample
from loadtest.servers import Budget, serving
from loadtest.workload import Prompts, Unique, Zipf
from serve.bench.machine import Machine, this_machine
from serve.catalog import open_catalog
from serve.domain.text import TextRequest, Tier
from serve.prompts.plan import Planner
from serve.settings.tree import Settings

TRAFFIC, T5 = "traffic", "t5"
SECTIONS = (TRAFFIC, T5)
PROMPTS, NEGATIVES, EMPTY = 200, 40, 0.3
"""Different prompts, different negative prompts, and the share of the orders whose negative prompt is empty."""
ZIPF = (0.6, 0.8, 1.0)
UNIQUE = "all unique"
SIDE, STEPS, GUIDANCE = 64, 2, 3.0
"""Of every picture: the smallest and quickest, with guidance, so that both sides are read."""
_GIVE_UP_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`orders` pictures for each kind of traffic, by `users` who always wait for one. `paired` is for T5."""

    sections: frozenset[str]
    orders: int
    users: int
    seed: int
    budget: Budget
    paired: PairedPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """One kind of traffic from an empty cache. `counts` are the server's counters, `told` what the jobs' own reports
    (`cache`) say, units by tier; `least` rows of token ids are different among the orders, so that no cache can do with
    fewer forwards. `failed` by reason."""

    name: str
    orders: int
    done: int
    counts: Counts
    told: Mapping[str, int]
    least: int
    failed: Mapping[str, int]

    @property
    def rows_per_job(self) -> float:
        return self.counts.rows / max(1, self.done)

    @property
    def least_per_job(self) -> float:
        return self.least / max(1, self.orders)

    @property
    def without_per_job(self) -> float:
        """Rows for each job if nothing were kept: one for each unit, of an encoder of which one output is read."""
        return self.counts.all_units / max(1, self.done)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    machine: Machine
    plan: Plan
    traffic: tuple[Traffic, ...]
    paired: Paired | None


Tell = Callable[[str], None]


async def measure(plan: Plan, serve: Serve, tell: Tell) -> Report:
    """`serve` starts a server of a folder of text encoders. Raises OperatorError."""
    traffic: tuple[Traffic, ...] = ()
    paired = None
    if TRAFFIC in plan.sections:
        traffic = await measure_traffic(plan, tell)
    if T5 in plan.sections:
        paired = await measure_paired(plan.paired, serve, tell)
    return Report(machine=this_machine(), plan=plan, traffic=traffic, paired=paired)


async def measure_traffic(plan: Plan, tell: Tell) -> tuple[Traffic, ...]:
    """All kinds of traffic through one server, which forgets everything in between."""
    planner = shipped_planner()
    measured = []
    tell("starting the server")
    async with serving("tandem", budget=plan.budget) as server, Meter(server.url, server.metrics_url) as meter:
        before = await meter.settled(units=1)  # the first picture's
        for name, prompts in kinds().items():
            await meter.empty()
            await meter.ready()
            tell(f"{name}: {plan.orders} orders")
            arrivals = orders(prompts, plan.orders, plan.seed)
            samples = await drive(server.url, arrivals, users=plan.users, give_up_s=_GIVE_UP_S)
            told = _told(samples)
            tell(f"{name}: waiting for the server's counters")
            after = await meter.settled(before, sum(told.values()))
            measured.append(
                Traffic(
                    name=name,
                    orders=len(arrivals),
                    done=sum(one.outcome is Outcome.DONE for one in samples),
                    counts=after.since(before),
                    told=told,
                    least=least_rows(planner, arrivals),
                    failed=failures(samples),
                )
            )
            before = after
    return tuple(measured)


def kinds() -> dict[str, Prompts]:
    """Traffic by how texts repeat, the positive and the negative side alike and drawn apart."""
    drawn = {
        f"Zipf {a:g}": Prompts(
            positive=Zipf(a=a, texts=PROMPTS), negative=Zipf(a=a, texts=NEGATIVES), empty_negative=EMPTY
        )
        for a in ZIPF
    }
    return drawn | {UNIQUE: Prompts(positive=Unique(), negative=Unique(), empty_negative=EMPTY)}


def orders(prompts: Prompts, count: int, seed: int) -> tuple[Arrival, ...]:
    wording = Wording(prompts, seed)
    arrivals = []
    for index in range(count):
        prompt, negative = wording.next()
        body = {
            "prompt": prompt,
            "negative_prompt": negative,
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "width": SIDE,
            "height": SIDE,
            "seed": index,
        }
        arrivals.append(Arrival(index=index, due_s=0.0, dialect="wait", body=body))
    return tuple(arrivals)


def least_rows(planner: Planner, arrivals: Sequence[Arrival]) -> int:
    """Different rows of token ids among the orders, by the product's own planner."""
    rows = {
        (unit.encoder, unit.token_ids)
        for arrival in arrivals
        for unit in planner.plan(
            TextRequest(
                model="",
                prompt=arrival.body["prompt"],
                negative_prompt=arrival.body["negative_prompt"],
                width=SIDE,
                height=SIDE,
            )
        ).units
    }
    return len(rows)


def failures(samples: Sequence[Sample]) -> dict[str, int]:
    """Requests that did not end as they should, by outcome and reason."""
    bad = [one for one in samples if one.outcome is not Outcome.DONE]
    return dict(Counter(f"{one.outcome}: {one.detail or one.status}" for one in bad).most_common())


def _told(samples: Sequence[Sample]) -> dict[str, int]:
    told = dict.fromkeys(map(str, Tier), 0)
    for sample in samples:
        for tier, units in ((sample.job or {}).get("cache") or {}).items():
            told[tier] += units
    return told


def shipped_planner() -> Planner:
    """Lays out texts as a server of the shipped model does."""
    with tempfile.TemporaryDirectory() as folder:
        catalog = open_catalog(Settings(data_dir=Path(folder)))
        return next(iter(catalog.planners().values()))
