"""From no replica at all to an image: what passes between an order and its picture, phase by phase."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import SecretStr

from loadtest.processes import TANDEM
from loadtest.servers import Budget, serving
from serve.bench.machine import Machine, this_machine
from serve.embedded import running_url
from serve.errors import OperatorError
from serve.jobs.store import JobStore
from serve.jobs.terms import Start, WorkerReport
from serve.settings.stores import JobSettings
from serve.telemetry.metrics import InProcessMetrics

IDLE_S = 1.0
"""Seconds without work after which the server's replica goes to sleep."""
WITHIN_S = 300.0
_POLL_S = 0.1
BEFORE, CLAIM, DRAWN = "policy, Serve, Ray's process", "claim", "text, steps, picture"
"""Phases around the replica's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`settings` are Tandem's, in groups; what scales is the bench's own."""

    starts: int
    model: str
    budget: Budget
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Seconds of each start's phases, which follow one another from the order to the picture. `told_s` are the cold
    starts that the replicas report, each from the order to its claim."""

    machine: Machine
    plan: Plan
    starts: Sequence[Mapping[str, float]]
    told_s: Sequence[float]

    @property
    def medians(self) -> Mapping[str, float]:
        return {phase: statistics.median(start[phase] for start in self.starts) for phase in self.starts[0]}

    @property
    def first_images_s(self) -> Sequence[float]:
        return [sum(start.values()) for start in self.starts]


async def measure(plan: Plan, tell: Callable[[str], None]) -> Report:
    """Raises OperatorError where the server does not start, sleep or draw."""
    own = {"replicas": 1, "min_replicas": 0, "max_replicas": 1, "idle_s": IDLE_S}
    settings = {**plan.settings, "diffusion": {**plan.settings.get("diffusion", {}), **own}}
    starts, told = [], []
    tell("a server that has drawn a picture")
    async with (
        serving(TANDEM, budget=plan.budget, settings=settings, model=plan.model) as server,
        httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as http,
    ):
        url = running_url(server.data_dir)
        assert url is not None
        store = JobStore(JobSettings(redis_url=SecretStr(url)), InProcessMetrics())
        try:
            for number in range(1, plan.starts + 1):
                tell(f"start {number} of {plan.starts}")
                phases, told_s = await _once(http, store)
                starts.append(phases)
                told.append(told_s)
        finally:
            await store.close()
    return Report(machine=this_machine(), plan=plan, starts=starts, told_s=told)


async def _once(http: httpx.AsyncClient, store: JobStore) -> tuple[Mapping[str, float], float]:
    await _until(lambda: _asleep(http), "the replica to sleep")
    ordered_at = time.time()
    answer = await http.post("/v1/jobs", json={"prompt": f"a red circle {ordered_at}", "num_inference_steps": 4})
    answer.raise_for_status()
    url = f"/v1/jobs/{answer.json()['id']}"

    async def ended() -> dict[str, Any] | None:
        job: dict[str, Any] = (await http.get(url)).json()
        return job if job["state"] not in ("queued", "encoding", "running", "storing") else None

    job = await _until(ended, "the picture")
    if job["state"] != "succeeded":
        raise OperatorError(f"the order that was to wake the replica is {job['state']}")
    report = await _until(lambda: _woken(store, job["request"]["model"], ordered_at), "the replica's last report")
    assert report.start is not None
    return phases_of(job, report.start), report.start_s


def phases_of(job: Mapping[str, Any], start: Start) -> dict[str, float]:
    """Seconds from the order to the picture. All clocks are this machine's."""
    timings = job["timings"]
    own_s = sum(start.phases.values())
    before_s = start.began_at - job["created_at"]
    return {
        BEFORE: before_s,
        **start.phases,
        CLAIM: timings["queued_s"] - before_s - own_s,
        DRAWN: timings["total_s"] - timings["queued_s"],
    }


async def _asleep(http: httpx.AsyncClient) -> bool:
    """Nor does a replica leave just now: until it hears of it, it claims."""
    fleet = (await http.get("/v1/fleet")).json()
    if any(place["replicas"] for place in fleet["data"]):
        return False
    ready = (await http.get("/readyz")).json()
    return bool(ready["pools"]["diffusion"]["detail"] == "asleep")


async def _woken(store: JobStore, model: str, ordered_at: float) -> WorkerReport | None:
    """What the replica that began after the order has told at last."""
    told = [each for each in (await store.crew(model)).asleep if each.start and each.start.began_at > ordered_at]
    return told[0] if told else None


async def _until(ask: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WITHIN_S
    while not (found := await ask()):
        if time.monotonic() > deadline:
            raise OperatorError(f"waited {WITHIN_S:.0f} s for {what}")
        await asyncio.sleep(_POLL_S)
    return found
