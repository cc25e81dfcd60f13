"""The policy without a cluster: what it wants, and how it decides over time."""

import itertools
import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from deployments.app import replicas
from deployments.autoscaling import REQUEST_TOKENS, QueuedTokens, ReplicaLoad, desired_replicas
from serve.scaling.steady import Steady
from serve.settings.pools import EncoderSettings


def desire(loads: list[ReplicaLoad], current: int, **changes: float) -> int:
    given = {"waiting_requests": 0, "ongoing_requests": 0, "min_replicas": 0, "max_replicas": 8}
    return desired_replicas(loads, current=current, target_queue_tokens=1000, **(given | changes))


def test_it_grows_with_the_tokens_that_wait() -> None:
    assert desire([ReplicaLoad(queued_tokens=900, busy=1.0)], 1) == 1, "busy, but nobody waits long"
    assert desire([ReplicaLoad(queued_tokens=3500, busy=1.0)], 1) == 4
    assert desire([ReplicaLoad(queued_tokens=1500), ReplicaLoad(queued_tokens=1500)], 2) == 3
    assert desire([ReplicaLoad(queued_tokens=10**6)], 1) == 8


def test_it_shrinks_no_further_than_the_rest_can_carry() -> None:
    assert desire([ReplicaLoad(100, busy=0.6)] * 4, 4) == 3, "2.4 replicas' work, at most 80 % each"
    assert desire([ReplicaLoad(100, busy=0.1)] * 4, 4) == 1


def test_it_sleeps_only_where_nobody_asks() -> None:
    assert desire([ReplicaLoad()], 1) == 0
    assert desire([ReplicaLoad(requests=0.2)], 1) == 1, "answered from its cache, but in use"
    assert desire([ReplicaLoad()], 1, ongoing_requests=0.1) == 1
    assert desire([ReplicaLoad()], 1, min_replicas=1) == 1


def test_requests_without_a_replica_wake_it() -> None:
    assert desire([], 0, waiting_requests=1) == 1
    assert desire([], 0, waiting_requests=5000 / REQUEST_TOKENS) == 5
    assert desire([], 0) == 0


LOADS = st.lists(st.builds(ReplicaLoad, st.floats(0, 1e5), st.floats(0, 1), st.floats(0, 100)), max_size=8)


@given(LOADS, st.integers(0, 8), st.integers(0, 4), st.integers(4, 8), st.floats(0, 50))
def test_bounds_hold(loads: list[ReplicaLoad], current: int, least: int, most: int, waiting: float) -> None:
    assert least <= desire(loads, current, min_replicas=least, max_replicas=most, waiting_requests=waiting) <= most


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_grows_at_once_and_shrinks_to_the_most_that_was_wanted_lately() -> None:
    clock = Clock()
    steady = Steady(60.0, clock)
    decisions = [1]
    for second in range(200):
        clock.now = second
        wanted = 4 if second == 10 else 2 if second == 40 else 0
        decisions.append(steady(wanted, decisions[-1]))
    changes = [
        (second - 1, replicas)
        for second, replicas in enumerate(decisions)
        if second and replicas != decisions[second - 1]
    ]
    # The three new ones of second 10 are seen, and count as wanted, in second 11.
    assert changes == [(10, 4), (72, 2), (101, 0)]


def test_a_replica_that_has_just_woken_is_left_alone() -> None:
    """Serve itself wakes the first one, and asks nobody."""
    clock = Clock()
    steady = Steady(60.0, clock)
    assert steady(0, 0) == 0
    clock.now = 1000
    assert steady(0, 1) == 1
    clock.now = 1059
    assert steady(0, 1) == 1
    clock.now = 1061
    assert steady(0, 1) == 0


@dataclass
class Fluid:
    """A pool as arithmetic: work flows in, each replica does `rate` tokens a second, new ones start in `start_s`."""

    rate: float
    start_s: float
    queue: float = 0.0
    replicas: int = 1
    target: int = 1
    ready_at: float = 0.0

    def step(self, now: float, arriving: float) -> list[ReplicaLoad]:
        if self.target != self.replicas and now >= self.ready_at:
            self.replicas = self.target
        self.queue += arriving
        done = min(self.queue, self.rate * self.replicas)
        self.queue -= done
        busy = done / (self.rate * self.replicas) if self.replicas else 0.0
        tokens = (self.queue + done * 0.1) / max(1, self.replicas)
        return [ReplicaLoad(tokens, busy, 1.0)] * self.replicas

    def scale(self, now: float, wanted: int) -> None:
        if wanted != self.target:
            self.ready_at = now + (self.start_s if wanted > self.replicas else 0.0)
            self.target = wanted


def simulate(arriving: float, seconds: int = 1200) -> tuple[Fluid, list[int]]:
    """Ticks of one second at a constant rate of arrival; the targets over time."""
    clock = Clock()
    steady = Steady(60.0, clock)
    pool = Fluid(rate=1000.0, start_s=10.0)
    targets = []
    for second in range(seconds):
        clock.now = second
        loads = pool.step(second, arriving)
        pool.scale(second, steady(desire(loads, pool.target, min_replicas=1), pool.target))
        targets.append(pool.target)
    return pool, targets


@pytest.mark.parametrize("arriving", [300.0, 1500.0, 3300.0, 5000.0])
def test_a_steady_load_gets_enough_replicas_and_no_flapping(arriving: float) -> None:
    pool, targets = simulate(arriving)
    assert arriving <= pool.rate * pool.replicas, "the queue grows for ever"
    assert pool.queue < arriving
    assert pool.replicas <= math.ceil(arriving / (pool.rate * 0.8)) + 1
    late = targets[400:]
    assert sum(earlier != later for earlier, later in itertools.pairwise(late)) == 0


ONE, TWO = (ReplicaID(unique_id=name, deployment_id=DeploymentID(name="x")) for name in ("one", "two"))


def context(target: int, running: list[ReplicaID], metrics: dict, queued: float = 0.0) -> AutoscalingContext:
    return AutoscalingContext(
        deployment_id=DeploymentID(name="TextEncoder-t5-xxl", app_name="tandem"),
        deployment_name="TextEncoder-t5-xxl",
        app_name="tandem",
        current_num_replicas=len(running),
        target_num_replicas=target,
        running_replicas=running,
        total_num_requests=queued,
        total_queued_requests=queued,
        aggregated_metrics=metrics,
        raw_metrics=None,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=3,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=None,
    )


def test_it_reads_what_serve_tells_and_travels_as_serve_sends_it() -> None:
    described = AutoscalingConfig(
        policy=AutoscalingPolicy(
            policy_function="deployments.autoscaling:QueuedTokens",
            policy_kwargs={"target_queue_tokens": 1000, "idle_s": 60.0},
        )
    ).policy
    policy = described.get_policy()(**described.policy_kwargs)
    tokens = {ONE: 1700.0, TWO: 800.0}
    assert policy(context(2, [ONE, TWO], {"queued_tokens": tokens, "busy": dict.fromkeys([ONE, TWO], 1.0)})) == (3, {})
    assert policy(context(0, [], {}, queued=1.0)) == (1, {})
    assert QueuedTokens(1000, 60.0)(context(1, [ONE], {})) == (1, {}), "it has not reported yet"


def test_a_pool_that_may_sleep_starts_awake_and_sleeps_when_it_has_been_idle() -> None:
    """Whatever the start takes: only then is it known that the encoder works here."""
    assert replicas(EncoderSettings(min_replicas=0))["autoscaling_config"]["initial_replicas"] == 1
    assert "initial_replicas" not in replicas(EncoderSettings(max_replicas=3))["autoscaling_config"]
    clock = Clock()
    policy = QueuedTokens(1000, 60.0, clock)
    decisions = []
    for second in range(400):
        clock.now = second
        running = [ONE] if second >= 300 else []
        decisions.append(policy(context(1, running, {}))[0])
    assert decisions.index(0) == 360, "loaded for 300 s, idle for 60 s"
