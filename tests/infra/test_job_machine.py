"""A random history of submissions, claims, previews, crashes, late workers, cancels and sweeps, against a model of the
contract.

The clock does not run here: a lease lapses, a job's time runs out and a job has waited when a rule moves a moment into
the past.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
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
from support.job_model import HELD, MAX_ATTEMPTS, Expected, FairShare, Told
from support.jobs import BROKEN

from serve.callers import Allowance
from serve.domain.jobs import ImageRef, JobState, Preview, Timings, WebhookState
from serve.domain.orders import ImageRequest, Priority
from serve.domain.text import Tier
from serve.embedded import EmbeddedRedis
from serve.errors import Conflict, JobGone, JobNotFound, LeaseLost, QueueFull, RateLimited
from serve.jobs.events import follow
from serve.jobs.store import Claim, Hold, JobStore, Terms, Want
from serve.settings.stores import JobSettings
from serve.telemetry.metrics import InProcessMetrics

MAX_QUEUED, STEPS = 4, 3
MAX_UNFINISHED = 3
OWNERS = {"": 1.0, "heavy": 3.0, "light": 0.5}
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
        self.fair = FairShare()
        self.forgotten: list[tuple[str, Terms]] = []
        self.claims: list[Claim] = []
        self.submitted = 0
        self.ended: list[tuple[JobState, bool]] = []

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

    def full(self, model: str, owner: str) -> bool:
        """Whether the model's line has no place for one more of this owner."""
        owners = [job.terms.owner for job in map(self.expected.get, self.queue()) if job and job.request.model == model]
        sharing = len({*owners, owner})
        below = sharing > 1 and owners.count(owner) < MAX_QUEUED / sharing
        return len(owners) >= MAX_QUEUED * (1.5 if below else 1)

    def settle_accounts(self) -> None:
        """After whatever changed the queue."""
        owners = {self.expected[job_id].terms.owner for job_id in self.queue()}
        self.fair.left(owners)
        for owner in owners:
            self.fair.joined(owner)

    def live(self) -> list[str]:
        return [job_id for job_id, job in self.expected.items() if not job.state.terminal]

    def holds(self, claim: Claim) -> bool:
        job = self.expected.get(claim.job_id)
        return job is not None and job.state.held and job.fence == claim.fence

    def held(self) -> list[Claim]:
        return [claim for claim in self.claims if self.holds(claim)]

    # What clients do.

    @initialize()
    def start_with_work(self) -> None:
        for model in MODELS:
            self.submit(model, SMALL, False, "", Priority.INTERACTIVE, 10)
        self.claim(ANY, True)

    @rule(
        model=st.sampled_from(MODELS),
        side=st.sampled_from([SMALL, LARGE]),
        ahead=st.booleans(),
        owner=st.sampled_from(list(OWNERS)),
        priority=st.sampled_from(Priority),
        cost=st.sampled_from([1, 10, 30]),
    )
    def submit(self, model: str, side: int, ahead: bool, owner: str, priority: Priority, cost: int) -> None:
        self.submitted += 1
        job_id = f"job{self.submitted}"
        request = ImageRequest(
            model=model, prompt=job_id, width=side, height=side, num_inference_steps=STEPS, guidance_scale=1.0, seed=1
        )
        terms = Terms(
            owner=owner,
            weight=OWNERS[owner],
            priority=priority,
            cost_ms=cost,
            fingerprint=f"order {job_id}",
            webhook="https://example.com/" if ahead else None,
            allowance=Allowance(max_unfinished=MAX_UNFINISHED if owner == "heavy" else None),
        )
        unfinished = sum(self.expected[each].terms.owner == owner for each in self.live())
        if owner == "heavy" and unfinished >= MAX_UNFINISHED:
            with pytest.raises(RateLimited):
                self.run(self.store.submit(job_id, request, terms=terms))
            return
        if self.full(model, owner):
            with pytest.raises(QueueFull):
                self.run(self.store.submit(job_id, request, terms=terms))
            return
        answer = self.run(self.store.submit(job_id, request, terms=terms))
        assert not answer.replayed
        self.expected[job_id] = Expected(request, self.submitted, terms)
        self.settle_accounts()
        if ahead:
            self.run(self.store.note_ahead(job_id, {"unit": Tier.ENCODED}))

    @with_jobs
    @rule(job_id=ANY_JOB)
    def submit_again(self, job_id: str) -> None:
        job = self.expected[job_id]
        again = self.run(self.store.submit(job_id, job.request, terms=job.terms))
        assert again.replayed
        assert (
            again.job
            == self.run(self.store.get(job_id))
            == self.run(self.store.peek(job.terms.owner, f"order {job_id}", job_id=job_id))
        )

    @with_jobs
    @rule(job_id=ANY_JOB, whose=st.booleans())
    def submit_another_under_the_same_id(self, job_id: str, whose: bool) -> None:
        job = self.expected[job_id]
        terms = replace(job.terms, owner="stranger") if whose else replace(job.terms, fingerprint="another")
        with pytest.raises(JobNotFound if whose else Conflict):
            self.run(self.store.submit(job_id, job.request, terms=terms))

    @precondition(lambda machine: machine.forgotten)
    @rule(gone=some(lambda machine: machine.forgotten), same=st.booleans())
    def submit_what_is_gone(self, gone: tuple[str, Terms], same: bool) -> None:
        job_id, terms = gone
        request = ImageRequest(
            model="shapes", prompt=job_id, width=8, height=8, num_inference_steps=1, guidance_scale=1.0, seed=1
        )
        with pytest.raises(JobGone if same else Conflict):
            self.run(self.store.submit(job_id, request, terms=terms if same else replace(terms, fingerprint="other")))

    @with_jobs
    @rule(job_id=ANY_JOB)
    def cancel(self, job_id: str) -> None:
        with pytest.raises(JobNotFound):
            self.run(self.store.cancel(job_id, "stranger"))
        self.run(self.store.cancel(job_id))
        job = self.expected[job_id]
        if job.state is JobState.QUEUED:
            job.become(JobState.CANCELLED)
            self.settle_accounts()
        job.cancel = True

    # What workers do.

    @precondition(lambda self: self.queue())
    @rule(wants=st.just(ANY) | WANTS, idle=st.booleans())
    def claim(self, wants: Sequence[Want], idle: bool) -> None:
        claim = self.run(self.store.claim("worker", wants, idle=idle))
        job = self.fair.choose([self.expected[job_id] for job_id in self.queue()], list(wants))
        if job is None:
            assert claim is (Hold.UNFIT if self.run(self.store.queue_depth()) else None)
            return
        if job.alone and not idle:
            assert claim is Hold.ALONE
            return
        alone = job.alone
        self.fair.claimed(job)
        job.attempt += 1
        job.fence += 1
        job.become(JobState.ENCODING)
        self.settle_accounts()
        assert claim == Claim(
            job_id=job.request.prompt,
            attempt=job.attempt,
            fence=job.fence,
            request=job.request,
            cost_ms=job.terms.cost_ms,
            alone=alone,
        )
        assert claim.last is not bool(self.run(self.store.queue_depth()))
        self.claims.append(claim)

    @with_claims
    @rule(claim=ANY_CLAIM, step=st.integers(0, STEPS), state=st.sampled_from(HELD))
    def renew(self, claim: Claim, step: int, state: JobState) -> None:
        if not self.holds(claim):
            with pytest.raises(LeaseLost):
                self.run(self.store.renew(claim, step, state))
            return
        job = self.expected[claim.job_id]
        for told in (step, 0):  # a sign of life without news takes no step back
            assert self.run(self.store.renew(claim, told, state)) is not job.cancel
            job.progress(told, state)

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
        job = self.expected.get(claim.job_id)
        write = self.write(claim, outcome)
        if self.holds(claim):
            self.run(write)
            self.expected[claim.job_id].settle(claim.fence, outcome)
            self.settle_accounts()
        elif job is not None and job.settled == (claim.fence, outcome):
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
                return self.store.fail(claim, BROKEN, retry=outcome == "retry", delay_s=LONG_S)

    # What time does.

    @with_live_jobs
    @rule(job_id=LIVE_JOB)
    def lose_the_worker(self, job_id: str) -> None:
        if self.expected[job_id].state.held:
            self.expected[job_id].lapsed = True
            assert self.raw.zadd("tandem:leases", {job_id: 1}, xx=True, ch=True) in (0, 1)

    @with_live_jobs
    @rule(job_id=LIVE_JOB)
    def run_out_of_time(self, job_id: str) -> None:
        self.expected[job_id].overdue = True
        assert self.raw.zadd("tandem:deadlines", {job_id: 1}, xx=True, ch=True) in (0, 1)
        self.claim(ANY, True)  # whatever it gets, not this job

    @precondition(lambda self: self.queue())
    @rule(job_id=some(lambda machine: machine.queue()), wants=WANTS)
    def have_waited(self, job_id: str, wants: Sequence[Want]) -> None:
        self.expected[job_id].waited = True
        assert self.raw.hset(f"tandem:job:{job_id}", "waiting", 1) == 0
        self.claim(wants, True)

    @precondition(lambda self: any(self.expected[job_id].put_off for job_id in self.queue()))
    @rule()
    def let_the_backoff_pass(self) -> None:
        for job_id in self.queue():
            self.expected[job_id].put_off = False
            self.raw.hset(f"tandem:job:{job_id}", "not_before", 0)

    @precondition(lambda self: any(job.state.terminal for job in self.expected.values()))
    @rule(job_id=some(lambda machine: [each for each, job in machine.expected.items() if job.state.terminal]))
    def outlive_the_record(self, job_id: str) -> None:
        """The sweep deletes it; late workers and late clients find nothing."""
        assert job_id not in self.run(self.store.overdue())
        assert self.run(self.store.forget([job_id])) == 0
        assert self.raw.zadd("tandem:ended", {job_id: 1}, xx=True, ch=True) == 1
        assert self.run(self.store.overdue()) == [job_id]
        assert self.run(self.store.forget([job_id, "never"])) == 1
        job = self.expected.pop(job_id)
        self.ended.append((job.state, job.dead))
        self.forgotten.append((job_id, job.terms))
        with pytest.raises(JobNotFound):
            self.run(self.store.get(job_id))

    @precondition(lambda self: any(job.state.terminal for job in self.expected.values()))
    @rule(delivered=st.booleans())
    def call_webhooks(self, delivered: bool) -> None:
        due = self.run(self.store.due_webhooks(lease_s=LONG_S))
        assert self.run(self.store.due_webhooks(lease_s=LONG_S)) == []
        waiting = {
            job_id for job_id, job in self.expected.items() if job.state.terminal and job.terms.webhook and not job.told
        }
        assert set(due) == waiting
        for job_id in due:
            self.run(self.store.webhook_done(job_id, delivered))
            self.expected[job_id].told = True
            self.expected[job_id].frozen = None
            state = self.run(self.store.get(job_id)).webhook_state
            assert state is (WebhookState.DELIVERED if delivered else WebhookState.FAILED)

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
                job.lost += 1
                job.retry()
                reaped += 1
        assert self.run(self.store.reap()) == reaped
        self.settle_accounts()

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
        self.claim(ANY, True)
        if late in ("succeed", "retry"):
            self.settle(claim, late)
        elif late == "preview":
            self.preview(claim, 0, STEPS, b"late")
        else:
            self.renew(claim, STEPS, JobState.STORING)

    # What must hold at every moment.

    @invariant()
    def every_record_is_sound(self) -> None:
        self.run(self.store.check_integrity())

    @invariant()
    def every_job_is_what_the_contract_says(self) -> None:
        queue = self.queue()
        assert self.run(self.store.queue_depth()) == len(queue)
        places: dict[str, list[int]] = {model: [] for model in MODELS}
        for job_id, job in self.expected.items():
            real = self.run(self.store.get(job_id))
            assert (real.state, real.attempt, real.step, real.request, real.owner) == (
                (job.state, job.attempt, job.step, job.request, job.terms.owner)
            )
            assert (real.eta_s is None) is job.state.terminal
            assert (real.position is not None) is (job_id in queue)
            if real.position is not None:
                places[job.request.model].append(real.position)
            if job.state.terminal:
                if job.frozen is None or job.frozen.timings.told_s is None:  # who reads the end first is noted, once
                    since = job.frozen or real
                    job.frozen = replace(since, timings=replace(since.timings, told_s=real.timings.told_s))
                assert real == job.frozen
        for taken in places.values():
            assert sorted(taken) == list(range(1, len(taken) + 1))

    @invariant()
    def every_list_has_its_jobs(self) -> None:
        newest = sorted(self.expected, key=lambda job_id: -self.expected[job_id].place)
        assert [job.id for job in self.run(self.store.jobs()).jobs] == newest
        dead = [job_id for job_id in newest if self.expected[job_id].dead]
        assert [job.id for job in self.run(self.store.jobs(dead=True)).jobs] == dead
        own = [job_id for job_id in newest if self.expected[job_id].terms.owner == "light"]
        page = self.run(self.store.jobs("light", count=2))
        rest = self.run(self.store.jobs("light", after=page.next)).jobs if page.next else ()
        assert [job.id for job in (*page.jobs, *rest)] == own

    @invariant()
    def every_end_was_told_once(self) -> None:
        ended = Counter([*self.ended, *((job.state, job.dead) for job in self.expected.values())])
        for state, dead in itertools.product([state for state in JobState if state.terminal], (False, True)):
            told = self.metrics.value("tandem_jobs_total", state=state, dead="yes" if dead else "no")
            assert told == ended[state, dead]

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
