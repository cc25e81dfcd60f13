"""The simulation itself: orders come, replicas claim, step, decode and die, and the job store decides who gets what."""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial

from serve.domain.orders import ImageRequest
from serve.jobs.terms import Hold
from serve.relief import AGED_S
from serve.scaling.watch import EVERY_S
from serve.simulate.clock import Clock
from serve.simulate.fleet import Fleet
from serve.simulate.outcome import Fate, Moment, Outcome
from serve.simulate.pools import PoolPlan, plan_pools
from serve.simulate.prices import Prices
from serve.simulate.redis_use import RedisMeter
from serve.simulate.replica import Held, Replica
from serve.simulate.scaling import Scaler
from serve.simulate.staff import Staff
from serve.simulate.store import SimulatedStore
from serve.simulate.traffic import Order, Traffic
from serve.simulate.waiting import Same, Waiting
from serve.wants import IDLE_WAIT_S, LEFT_TO_OTHERS_S, wants_of

SWEEP_S = 1.0
"""Between two looks of the sweep, as in the server."""
AFTER_S = 86_400.0
"""After its trace a simulation ends in any case: what is not done by then is never done in this fleet."""
MOMENTS = 240
"""In which the state is written down."""
RENEWED_SHARE = 1 / 6
"""Of a lease, what has passed of it on average when its worker dies: signs of life come each third of it."""


def simulate(fleet: Fleet, traffic: Traffic, seed: int = 0, slices: int = 1) -> Outcome:
    """Raises OperatorError for a fleet that can't be. `slices` says of how many equal parts these are one."""
    return _World(fleet, plan_pools(fleet), traffic, seed, slices).run()


class _World:
    """Owns: the clock, the store, the pools' staff, the fates of the orders."""

    def __init__(self, fleet: Fleet, pools: Mapping[str, PoolPlan], traffic: Traffic, seed: int, slices: int) -> None:
        self._fleet, self._pools, self._traffic, self._slices = fleet, pools, traffic, slices
        self._settings = fleet.job_settings()
        self._lots = random.Random(f"world/{seed}")
        self._clock = Clock()
        self._store = SimulatedStore(self._settings)
        self._waiting = Waiting(self._lots)
        self._meter = RedisMeter(fleet.redis, slices)
        self._cost = Prices(pools).cost_ms
        self._fates: dict[str, Fate] = {}
        self._orders: dict[str, Order] = {}
        self._queued: OrderedDict[str, float] = OrderedDict()
        until_ms = 1000 * traffic.duration_s
        self._staff = {
            name: Staff(pool, self._clock, until_ms, self._begin, self._drawn) for name, pool in pools.items()
        }
        self._scaler = Scaler(pools, self._clock)
        self._busy = self._rows = self._held = 0
        self._moments: list[Moment] = []

    def run(self) -> Outcome:
        began = time.perf_counter()
        for staff in self._staff.values():
            about = staff.plan.about
            for _ in range(about.replicas):
                staff.start(about.cold_start_s if about.from_zero else 0)
        self._clock.at(1000 * SWEEP_S, self._sweep)
        if self._scaler.scales:
            self._clock.at(1000 * EVERY_S, self._scale)
        self._clock.at(0, self._look)
        for number, order in enumerate(self._traffic.orders):
            while self._clock.next_ms <= 1000 * order.due_s:
                self._clock.step()
            self._clock.go(1000 * order.due_s)
            self._submit(f"j{number}", order)
        until_ms = 1000 * (self._traffic.duration_s + AFTER_S)
        while (self._queued or self._held) and self._clock.next_ms < until_ms:
            self._clock.step()
        self._pass()
        return self._outcome(time.perf_counter() - began)

    def _submit(self, job_id: str, order: Order) -> None:
        asked, now = order.request, self._clock.now_ms
        fate = self._fates[job_id] = Fate(order.due_s, order.owner, asked.model, asked.num_images)
        self._meter.submitted(len(self._queued), self._held)
        if not self._holds(asked) or not self._store.submit(
            now,
            job_id,
            asked,
            owner=order.owner,
            priority=order.priority,
            cost_ms=self._cost(asked),
            replicas=max(1, self._living(asked.model)),
        ):
            fate.ended = "refused"
            return
        self._orders[job_id] = order
        self._scaler.arrived(asked, self._cost(asked))
        self._joined(job_id)

    def _joined(self, job_id: str) -> None:
        """The job waits: those ask that are told of it."""
        self._pass()
        self._queued[job_id] = self._clock.now_ms
        request = self._orders[job_id].request
        for group, replica in self._waiting.told(request.model, request.pixels):
            self._meter.told()
            if not self._queued or not self._claim(replica, group):
                self._meter.in_vain(len(self._queued))
        if job_id in self._queued:
            # They can't take it: another asks of itself, a full one when an idle one would have had it, any after that.
            for after_s, every_s in ((0.0, IDLE_WAIT_S), (LEFT_TO_OTHERS_S, LEFT_TO_OTHERS_S), (AGED_S, AGED_S)):
                jitter_s = min(1.0, self._lots.random() * every_s / max(1, len(self._waiting)))
                self._clock.at(self._clock.now_ms + 1000 * (after_s + jitter_s), partial(self._aged, job_id))

    def _aged(self, job_id: str) -> None:
        if job_id in self._queued:
            self._ask_all()

    def _ask_all(self) -> None:
        """All that wait ask of themselves, in an order by lot."""
        groups = self._waiting.groups()
        for group, replica in self._waiting.drawn(groups):
            if not self._queued:
                break
            if not self._claim(replica, group):
                groups.remove(group)  # the others of it would hear the same

    def _claim(self, replica: Replica, asks: Same) -> bool:
        """Whether the replica got a job."""
        now = self._clock.now_ms
        found = self._store.claim(now, replica.name, asks.wants, idle=asks.idle)
        if found is None or isinstance(found, Hold):
            return False
        job_id, fence, last = found
        self._pass()
        del self._queued[job_id]
        self._meter.claimed(len(self._queued))
        self._held += 1
        fate, request = self._fates[job_id], self._orders[job_id].request
        fate.attempts += 1
        if fate.began_s is None:
            fate.began_s = now / 1000
        self._busy += not replica.rows
        self._rows += request.num_images
        trip = self._fleet.trip_ms
        replica.take(Held(job_id, fence, request, request.num_images), trip + self._fleet.text_ms)
        self._waiting.leave(replica)
        if last:
            self._wait(replica)
        else:
            self._clock.at(now + trip, partial(self._ask, replica))
        return True

    def _ask(self, replica: Replica) -> None:
        """A replica with a free row asks, and waits where nothing is for it."""
        if not replica.alive or replica.leaving:
            return
        self._wait(replica)
        if self._queued and replica in self._waiting:
            wants = wants_of(replica.pool.placement, replica.rows, replica.pool.batch)
            if not self._claim(replica, Same(wants, not replica.rows)):
                self._meter.in_vain(len(self._queued))

    def _wait(self, replica: Replica) -> None:
        self._pass()
        wants = wants_of(replica.pool.placement, replica.rows, replica.pool.batch)
        if wants and not replica.leaving:
            self._waiting.join(replica, wants)
        else:
            self._waiting.leave(replica)

    def _drawn(self, replica: Replica, job: Held) -> None:
        self._pass()
        self._rows -= 1
        self._busy -= not replica.rows
        if not job.left:
            self._clock.at(self._clock.now_ms + self._fleet.store_ms, partial(self._stored, job))
        if replica.leaving and not replica.held:
            self._staff[replica.pool.name].gone(replica)
        self._ask(replica)

    def _stored(self, job: Held) -> None:
        self._held -= 1
        self._meter.settled()
        now = self._clock.now_ms
        if self._store.settle(now, job.job_id, job.fence):
            self._end(job.job_id, "done")
            self._fates[job.job_id].done_s = now / 1000
        else:  # its time was over while it was drawn
            self._store.forget(now, job.job_id)
            self._end(job.job_id, "expired")

    def _begin(self, replica: Replica) -> None:
        hours = replica.pool.about.mtbf_h
        if hours is not None:
            lasts_h = self._lots.expovariate(1 / hours)
            self._clock.at(self._clock.now_ms + 3.6e6 * lasts_h, partial(self._lose, replica))
        self._ask(replica)

    def _lose(self, replica: Replica) -> None:
        """Its leases run out, and another one is started."""
        if not replica.alive:
            return
        self._pass()
        now = self._clock.now_ms
        self._rows -= replica.rows
        self._busy -= replica.rows > 0
        self._waiting.leave(replica)
        for job in self._staff[replica.pool.name].lose(replica):
            self._held -= 1
            self._store.last_sign(now - 1000 * RENEWED_SHARE * self._settings.lease_s, job.job_id, job.fence)
            self._queued[job.job_id] = now  # it will be, when the lease has lapsed and the sweep has seen it

    def _scale(self) -> None:
        """A look of the policy."""
        queued = ((request, self._cost(request)) for request in (self._orders[each].request for each in self._queued))
        held = (
            (job.request, self._cost(job.request) * replica.left_of(job))
            for staff in self._staff.values()
            for replica in (*staff.living, *staff.leaving)
            for job in replica.held.values()
        )
        for name, number in self._scaler.decide(queued, held, self._staff).items():
            for replica in self._staff[name].scale(number):
                self._pass()
                self._waiting.leave(replica)
                if not replica.held:
                    self._staff[name].gone(replica)
        self._clock.at(self._clock.now_ms + 1000 * EVERY_S, self._scale)

    def _sweep(self) -> None:
        """Leases that lapsed, and orders that nobody began in time."""
        now = self._clock.now_ms
        if self._queued and self._store.reap(now):
            for job_id in list(self._queued):
                state = self._store.state(job_id)
                if state in ("expired", "failed"):
                    del self._queued[job_id]
                    self._store.forget(now, job_id)
                    self._end(job_id, state)
            self._ask_all()
        self._clock.at(now + 1000 * SWEEP_S, self._sweep)

    def _end(self, job_id: str, how: str) -> None:
        self._fates[job_id].ended = how
        del self._orders[job_id]

    def _look(self) -> None:
        alive = sum(len(staff.living) for staff in self._staff.values())
        self._moments.append(Moment(self._clock.now_ms / 1000, len(self._queued), self._rows, alive))
        self._clock.at(self._clock.now_ms + 1000 * self._traffic.duration_s / MOMENTS, self._look)

    def _pass(self) -> None:
        """Who waits or is busy will change now."""
        self._meter.passes(self._clock.now_ms, len(self._waiting), self._busy, self._rows)

    def _holds(self, asked: ImageRequest) -> bool:
        """As the door does: whether any pool draws the model at that size."""
        return any(
            each.placement.model == asked.model and asked.pixels <= each.placement.max_pixels
            for each in self._pools.values()
        )

    def _living(self, model: str) -> int:
        return sum(len(staff.living) for staff in self._staff.values() if staff.plan.placement.model == model)

    def _outcome(self, took_s: float) -> Outcome:
        end_s = max(self._clock.now_ms / 1000, self._traffic.duration_s)
        return Outcome(
            name=self._traffic.name,
            duration_s=self._traffic.duration_s,
            end_s=end_s,
            fates=list(self._fates.values()),
            pools=[staff.use(self._fleet) for staff in self._staff.values()],
            redis=self._meter.use(end_s),
            moments=self._moments,
            slices=self._slices,
            took_s=took_s,
        )
