"""One replica: its rows step together by the server's scheduler, its VAE decodes one image after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from serve.diffusion.scheduler import Group, Row, StepPlan
from serve.domain.orders import ImageRequest
from serve.jobs.records import steps_of
from serve.models.samplers import forwards_of
from serve.simulate.clock import Clock
from serve.simulate.pools import PoolPlan
from serve.simulate.steps import SimulatedSteps


@dataclass(slots=True)
class Held:
    """A claimed job; `left` counts its images that are not decoded yet, `forwards` an image's forward passes, once it
    has joined the steps."""

    job_id: str
    fence: int
    request: ImageRequest
    left: int
    forwards: int = 0


@dataclass(slots=True)
class _Stepping:
    """Steps under way: `times` of the plan from `since_ms` on, each of `step_ms`."""

    plan: StepPlan
    since_ms: float
    step_ms: float
    times: int


class Replica:
    """`rows` are the images in hand that are not drawn yet, as a worker counts them; who is `leaving` claims no more.

    Owns: its jobs, its step loop, its VAE. `busy_ms` is the time in steps, `stepped` the lanes of all steps.
    """

    def __init__(self, pool: PoolPlan, number: int, clock: Clock, drawn: Callable[[Replica, Held], None]) -> None:
        """`drawn` is told of each image that was decoded: a job whose `left` is 0 is drawn whole."""
        self.pool = pool
        self.name = f"{pool.name}#{number}"
        self.rows = 0
        self.alive = True
        self.leaving = False
        self.held: dict[str, Held] = {}
        self.busy_ms = 0.0
        self.images = 0
        self._clock = clock
        self._drawn = drawn
        self._steps = SimulatedSteps(pool.times)
        self._stepping: _Stepping | None = None
        self._vae_free_ms = 0.0

    def take(self, job: Held, text_ms: float) -> None:
        """Its images are in hand from now on, and join the steps when the text is there."""
        self.held[job.job_id] = job
        self.rows += job.request.num_images
        self._clock.at(self._clock.now_ms + text_ms, partial(self._join, job))

    def lose(self) -> list[Held]:
        """The replica is gone; what it held is answered."""
        if self._stepping is not None:
            self.busy_ms += self._clock.now_ms - self._stepping.since_ms
        lost = list(self.held.values())
        self.alive, self.held, self._stepping, self.rows = False, {}, None, 0
        return lost

    def left_of(self, job: Held) -> float:
        """The share of a held job's steps that are not made yet."""
        if not job.forwards:
            return 1.0
        made = self._steps.made(job.job_id)
        if made is None:
            return 0.0
        under_way = self._stepping
        if under_way is not None and any(row.run_id == job.job_id for row in under_way.plan.rows):
            made += int((self._clock.now_ms - under_way.since_ms) / under_way.step_ms)
        return max(0.0, 1 - made / job.forwards)

    def _join(self, job: Held) -> None:
        if not self.alive:
            return
        request, factor = job.request, self.pool.shape.vae_scale_factor
        group = Group((request.height // factor, request.width // factor))
        forwards = job.forwards = forwards_of(request.scheduler, steps_of(request))
        rows = [Row(job.job_id, index, forwards, group, request.lanes) for index in range(request.num_images)]
        if self._stepping is None:
            self._steps.add(rows)
            self._begin()
            return
        self._cut_short()
        self._steps.add(rows)

    def _cut_short(self) -> None:
        """Who comes joins after the step under way."""
        under_way = self._stepping
        assert under_way is not None
        made = (self._clock.now_ms - under_way.since_ms) / under_way.step_ms
        times = min(under_way.times, max(1, math.ceil(made)))
        if times < under_way.times:
            self._schedule(under_way.plan, under_way.since_ms, under_way.step_ms, times)

    def _begin(self) -> None:
        plan = self._steps.plan()
        if not plan.rows:
            self._stepping = None
            return
        now = self._clock.now_ms
        since = now if self.pool.beside else max(now, self._vae_free_ms)
        lanes = sum(row.lanes for row in plan.rows)
        self._schedule(plan, since, self.pool.times.step_ms(plan.rows[0].group.shape, lanes), self._steps.alike(plan))

    def _schedule(self, plan: StepPlan, since_ms: float, step_ms: float, times: int) -> None:
        self._stepping = _Stepping(plan, since_ms, step_ms, times)
        self._clock.at(since_ms + times * step_ms, partial(self._stepped, self._stepping))

    def _stepped(self, made: _Stepping) -> None:
        if made is not self._stepping:
            return  # it was cut short, or the replica is gone
        self.busy_ms += made.times * made.step_ms
        result = self._steps.commit_many(made.plan, made.step_ms, made.times)
        for row in result.finished:
            job = self.held[row.run_id]
            self._vae_free_ms = max(self._clock.now_ms, self._vae_free_ms)
            self._vae_free_ms += self.pool.decode_ms * job.request.pixels / 1e6
            self._clock.at(self._vae_free_ms, partial(self._decoded, job))
        self._begin()

    def _decoded(self, job: Held) -> None:
        if not self.alive:
            return
        self.rows -= 1
        self.images += 1
        job.left -= 1
        if not job.left:
            del self.held[job.job_id]
        self._drawn(self, job)
