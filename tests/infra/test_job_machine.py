"""A random history of submissions, claims, previews, crashes, late workers, cancels and sweeps, against a model of the
contract.

The clock does not run here: a lease lapses, a job's time runs out and a job has waited when a rule moves a moment into
the past.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pydantic import SecretStr
from support.job_model import MAX_ATTEMPTS, Expected, Told
from support.jobs import BROKEN

from serve.domain import ImageRef, ImageRequest, JobState, Preview, Tier, Timings
from serve.embedded import EmbeddedRedis
from serve.errors import LeaseLost, QueueFull
from serve.jobs.events import follow
from serve.jobs.store import Claim, JobStore, Want
from serve.settings import JobSettings
from serve.telemetry.metrics import InProcessMetrics

MAX_QUEUED, STEPS = 3, 3
MODELS = ("shapes", "other")
SMALL, LARGE = 8, 16
UPTO = 2**31
LONG_S = 600.0
LATE = ["renew", "preview", "succeed", "retry", "unwanted"]
ANY = tuple(Want(model, 0, UPTO) for model in MODELS)
BOUNDS = st.sampled_from([0, SMALL**2, LARGE**2, UPTO])
WANTS = st.lists(st.builds(Want, st.sampled_from(MODELS), BOUNDS, BOUNDS, st.sampled_from([0.0, LONG_S])), max_size=3)
T = TypeVar("T")


def some(choices: Callable[[JobMachine], Sequence[T]]) -> Any:
    """One of the machine's present choices."""
    return st.runner().flatmap(lambda machine: st.sampled_from(choices(machine)))


ANY_JOB = some(lambda machine: list(machine.expected))
LIVE_JOB = some(lambda machine: machine.live())
# Workers keep every claim that they ever had and use it however late.
ANY_CLAIM = some(lambda machine: machine.claims) | some(lambda machine: machine.held() or machine.claims)
with_jobs = precondition(lambda machine: machine.expected)
with_live_jobs = precondition(lambda machine: machine.live())
with_claims = precondition(lambda machine: machine.claims)


class JobMachine(RuleBasedStateMachine):
    def __init__(self, server: EmbeddedRedis) -> None:
        super().__init__()
        self.server = server
        self.raw = redis.Redis.from_url(server.url)
        self.raw.flushall()
        self.runner = asyncio.Runner()
        self.metrics = InProcessMetrics()
        tree = JobSettings(
            redis_url=SecretStr(server.url), max_queued=MAX_QUEUED, max_attempts=MAX_ATTEMPTS, lease_s=600
        )
        # Two processes: whatever one did, the other must see.
        self.stores = [JobStore(tree, self.metrics) for _ in range(2)]
        self.expected: dict[str, Expected] = {}
        self.claims: list[Claim] = []
        self.submitted = 0

    def teardown(self) -> None:
        for store in self.stores:
            self.runner.run(store.close())
        self.runner.close()
        self.raw.close()

    @property
    def store(self) -> JobStore:
        self.stores.reverse()
        return self.stores[0]

    def run(self, awaitable: Awaitable[T]) -> T:
        async def wait() -> T:
            return await awaitable

        return self.runner.run(wait())

    def queue(self) -> list[str]:
        queued = (job_id for job_id, job in self.expected.items() if job.state is JobState.QUEUED)
        return sorted(queued, key=lambda job_id: self.expected[job_id].place)

    def live(self) -> list[str]:
        return [job_id for job_id, job in self.expected.items() if not job.state.terminal]

    def holds(self, claim: Claim) -> bool:
        job = self.expected[claim.job_id]
        return job.state is JobState.RUNNING and job.fence == claim.fence

    def held(self) -> list[Claim]:
        return [claim for claim in self.claims if self.holds(claim)]

    # What clients do.

    @initialize()
    def start_with_work(self) -> None:
        for model in MODELS:
            self.submit(model, SMALL, ahead=False)
        self.claim(ANY)

    @rule(model=st.sampled_from(MODELS), side=st.sampled_from([SMALL, LARGE]), ahead=st.booleans())
    def submit(self, model: str, side: int, ahead: bool) -> None:
        self.submitted += 1
        job_id = f"job{self.submitted}"
        request = ImageRequest(
            model=model, prompt=job_id, width=side, height=side, num_inference_steps=STEPS, guidance_scale=1.0, seed=1
        )
        if len(self.queue()) >= MAX_QUEUED:
            with pytest.raises(QueueFull):
                self.run(self.store.submit(job_id, request))
            return
        self.run(self.store.submit(job_id, request))
        self.expected[job_id] = Expected(request, self.submitted)
        if ahead:
            self.run(self.store.note_ahead(job_id, {"unit": Tier.ENCODED}))

    @with_jobs
    @rule(job_id=ANY_JOB)
    def submit_again(self, job_id: str) -> None:
        assert self.run(self.store.submit(job_id, self.expected[job_id].request)) == self.run(self.store.get(job_id))

    @with_jobs
    @rule(job_id=ANY_JOB)
    def cancel(self, job_id: str) -> None:
        self.run(self.store.cancel(job_id))
        job = self.expected[job_id]
        if job.state is JobState.QUEUED:
            job.become(JobState.CANCELLED)
        job.cancel = True

    # What workers do.

    @precondition(lambda self: self.queue())
    @rule(wants=st.just(ANY) | WANTS)
    def claim(self, wants: Sequence[Want]) -> None:
        claim = self.run(self.store.claim("worker", wants))
        queue = [self.expected[job_id] for job_id in self.queue()]
        job = next((job for want in wants for job in queue if job.satisfies(want)), None)
        if job is None:
            assert claim is None
            return
        job.attempt += 1
        job.fence += 1
        job.become(JobState.RUNNING)
        assert claim == Claim(job_id=job.request.prompt, attempt=job.attempt, fence=job.fence, request=job.request)
        self.claims.append(claim)

    @with_claims
    @rule(claim=ANY_CLAIM, step=st.integers(0, STEPS))
    def renew(self, claim: Claim, step: int) -> None:
        job = self.expected[claim.job_id]
        if not self.holds(claim):
            with pytest.raises(LeaseLost):
                self.run(self.store.renew(claim, step))
            return
        for told in (step, 0):  # a sign of life without news takes no step back
            assert self.run(self.store.renew(claim, told)) is not job.cancel
        job.lapsed = False
        if step > job.step:
            job.step = step
            job.tell(step)

    @with_claims
    @rule(claim=ANY_CLAIM, index=st.integers(0, 2), step=st.integers(0, 2 * STEPS), data=st.binary(max_size=9))
    def preview(self, claim: Claim, index: int, step: int, data: bytes) -> None:
        write = self.store.preview(claim, Preview("run", index, step, 2 * STEPS, data))
        if self.holds(claim):
            self.run(write)
            self.expected[claim.job_id].tell((step + 1) // 2, index, data)
        else:
            with pytest.raises(LeaseLost):
                self.run(write)

    @with_claims
    @rule(claim=ANY_CLAIM, outcome=st.sampled_from(["succeed", "fail", "retry", "cancelled", "release"]))
    def settle(self, claim: Claim, outcome: str) -> None:
        job = self.expected[claim.job_id]
        write = self.write(claim, outcome)
        if self.holds(claim):
            self.run(write)
            job.settle(claim.fence, outcome)
        elif job.settled == (claim.fence, outcome):
            self.run(write)  # the answer to the first call was lost
        else:
            with pytest.raises(LeaseLost):
                self.run(write)

    def write(self, claim: Claim, outcome: str) -> Awaitable[None]:
        image = ImageRef(index=0, key="k", seed=1, width=8, height=8, content_type="image/png", bytes=claim.fence)
        match outcome:
            case "succeed":
                return self.store.succeed(claim, images=[image], cache={"unit": Tier.MEMORY}, timings=Timings())
            case "cancelled":
                return self.store.cancelled(claim)
            case "release":
                return self.store.release(claim)
            case _:
                return self.store.fail(claim, BROKEN, retry=outcome == "retry")

    # What time does.

    @with_live_jobs
    @rule(job_id=LIVE_JOB)
    def lose_the_worker(self, job_id: str) -> None:
        if self.expected[job_id].state is JobState.RUNNING:
            self.expected[job_id].lapsed = True
            assert self.raw.zadd("tandem:leases", {job_id: 1}, xx=True, ch=True) in (0, 1)

    @with_live_jobs
    @rule(job_id=LIVE_JOB)
    def run_out_of_time(self, job_id: str) -> None:
        self.expected[job_id].overdue = True
        assert self.raw.zadd("tandem:deadlines", {job_id: 1}, xx=True, ch=True) in (0, 1)
        self.claim(ANY)  # whatever it gets, not this job

    @precondition(lambda self: self.queue())
    @rule(job_id=some(lambda machine: machine.queue()), wants=WANTS)
    def have_waited(self, job_id: str, wants: Sequence[Want]) -> None:
        self.expected[job_id].waited = True
        assert self.raw.hset(f"tandem:job:{job_id}", "waiting", 1) == 0
        self.claim(wants)

    @precondition(
        lambda self: any(self.expected[job_id].lapsed or self.expected[job_id].overdue for job_id in self.live())
    )
    @rule()
    def sweep(self) -> None:
        reaped = 0
        for job in self.expected.values():
            if job.due:
                job.become(JobState.EXPIRED)
                reaped += 1
            elif job.lapsed:
                job.retry()
                reaped += 1
        assert self.run(self.store.reap()) == reaped

    @precondition(lambda self: self.held())
    @rule(
        claim=some(lambda machine: machine.held()),
        late=st.sampled_from(["renew", "preview", "succeed", "retry", "unwanted"]),
    )
    def take_over(self, claim: Claim, late: str) -> None:
        """Where fencing matters most: two workers believe that they hold the job, and the late one speaks first."""
        if late == "unwanted":
            self.cancel(claim.job_id)
        self.lose_the_worker(claim.job_id)
        self.sweep()
        self.claim(ANY)
        if late in ("succeed", "retry"):
            self.settle(claim, late)
        elif late == "preview":
            self.preview(claim, 0, STEPS, b"late")
        else:
            self.renew(claim, STEPS)

    # What must hold at every moment.

    @invariant()
    def every_record_is_sound(self) -> None:
        self.run(self.store.check_integrity())

    @invariant()
    def every_job_is_what_the_contract_says(self) -> None:
        queue = self.queue()
        assert self.run(self.store.queue_depth()) == len(queue)
        for job_id, job in self.expected.items():
            real = self.run(self.store.get(job_id))
            position = queue.index(job_id) + 1 if job_id in queue else None
            assert (real.state, real.attempt, real.step, real.position, real.request) == (
                (job.state, job.attempt, job.step, position, job.request)
            )
            if job.state.terminal:
                job.frozen = job.frozen or real
                assert real == job.frozen

    @invariant()
    def every_end_was_told_once(self) -> None:
        for state in JobState:
            if state.terminal:
                ended = sum(job.state is state for job in self.expected.values())
                assert self.metrics.value("tandem_jobs_total", state=state) == ended

    @with_jobs
    @rule(job_id=ANY_JOB)
    def every_event_was_told_once_in_order(self, job_id: str) -> None:
        async def told() -> list[Told]:
            events, _ = await self.store.events_after(job_id, None)
            if self.expected[job_id].state.terminal:
                assert [event async for event in follow(self.store, job_id)] == events
            return [(event.state, event.step, event.index, event.preview) for event in events]

        assert self.run(told()) == self.expected[job_id].history


class DurableMachine(JobMachine):
    """The same on a Redis that dies in between."""

    @with_jobs
    @rule()
    def kill_and_restart_redis(self) -> None:
        self.server.kill()
        self.server.start()


def test_any_history_keeps_the_contract(redis_server: EmbeddedRedis) -> None:
    run_state_machine_as_test(
        lambda: JobMachine(redis_server),
        settings=settings(
            max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_any_history_keeps_the_contract_while_redis_dies(jobs_redis: EmbeddedRedis) -> None:
    run_state_machine_as_test(
        lambda: DurableMachine(jobs_redis),
        settings=settings(
            max_examples=6, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
