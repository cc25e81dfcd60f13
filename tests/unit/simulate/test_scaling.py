"""Pools whose number of replicas changes: the server's policy on a simulated clock."""

import random
from itertools import pairwise
from typing import Any

import pytest
from unit.simulate.test_world import DECODE_MS, STEP_MS, fleet, latencies, traffic

from serve.scaling.watch import EVERY_S
from serve.simulate import traffic as traffics
from serve.simulate.outcome import PoolUse
from serve.simulate.scale import part, slices_of
from serve.simulate.sizing import sizes
from serve.simulate.world import simulate

COLD_S, IDLE_S = 30.0, 120.0
WORK_S = (10 * STEP_MS + DECODE_MS) / 1000


def scaled(least: int, most: int, **more: Any) -> dict[str, Any]:
    own = {"replicas": least, "min_replicas": least, "max_replicas": most, "cold_start_s": COLD_S}
    return own | {"idle_s": IDLE_S, "target_wait_s": 5.0} | more


def most_of(pool: PoolUse) -> int:
    return max(cards for _, cards in pool.course)


def test_an_order_wakes_a_pool_that_sleeps_and_it_sleeps_again() -> None:
    found = simulate(fleet(a=scaled(0, 4)), traffic({"due_s": 10.5}, {"due_s": 600.0}))
    (pool,) = found.pools
    first, second = latencies(found)
    for latency in (first, second):
        assert COLD_S + WORK_S < latency < COLD_S + WORK_S + 2 * EVERY_S
    assert [cards for _, cards in pool.course] == [0, 1, 0, 1]
    assert pool.changes == 3
    awake_s = COLD_S + IDLE_S
    assert pool.hours * 3600 == pytest.approx(awake_s + WORK_S, abs=3 * EVERY_S)


def test_work_that_comes_all_at_once_is_shared_and_every_order_is_drawn_once() -> None:
    found = simulate(fleet(a=scaled(1, 8)), traffic(*({"due_s": 1.0} for _ in range(120)), {"due_s": 900.0}))
    (pool,) = found.pools
    assert found.counts == {"done": 121}
    assert {fate.attempts for fate in found.fates} == {1}
    assert most_of(pool) == 8
    assert pool.course[-1][1] == 1
    assert max(latencies(found)) < 120 * WORK_S / 2


def test_bursts_with_pauses_shorter_than_the_patience_make_no_replica_go() -> None:
    lines = [{"due_s": 60.0 * burst + 0.1 * n} for burst in range(10) for n in range(20)]
    found = simulate(fleet(a=scaled(1, 4)), traffic(*lines))
    (pool,) = found.pools
    numbers = [cards for _, cards in pool.course]
    assert sum(later < earlier for earlier, later in pairwise(numbers)) <= 1  # the first burst found it cold
    assert pool.changes <= 4


def test_the_number_stays_within_its_bounds_and_costs_less_than_the_most() -> None:
    rng, now, lines = random.Random(3), 0.0, []
    while now < 1500:
        now += rng.expovariate(0.1 if now < 500 or now > 800 else 3.0)
        lines.append({"due_s": now})
    own = fleet(a=scaled(1, 6))
    found, whole = simulate(own, traffic(*lines)), simulate(own.with_replicas({"a": 6}), traffic(*lines))
    (pool,), (fixed,) = found.pools, whole.pools
    assert {cards for _, cards in pool.course[1:]} <= set(range(1, 7))
    assert most_of(pool) > 3
    assert pool.hours < 0.75 * fixed.hours == pytest.approx(0.75 * 6 * whole.duration_s / 3600)
    assert found.counts == {"done": len(lines)}


def test_replicas_that_are_lost_while_they_scale_cost_no_order() -> None:
    lines = [{"due_s": 2.0 * n + 0.01 * k} for n in range(150) for k in range(1 + 3 * (n // 30 % 2))]
    found = simulate(fleet(a=scaled(0, 6, mtbf_h=0.02, cold_start_s=5.0)), traffic(*lines))
    assert found.pools[0].lost > 3
    assert set(found.counts) <= {"done", "failed"}
    assert found.counts["done"] > 0.9 * len(lines)


def test_a_slice_of_a_pool_that_scales_scales_too() -> None:
    own = fleet(a=scaled(0, 40), b=scaled(4, 64))
    half = part(own, 4).pools
    assert [(pool.least, pool.most) for pool in half.values()] == [(0, 10), (1, 16)]
    orders = traffic(*({"due_s": 0.1 * n} for n in range(100)))
    assert slices_of(own, orders, 10) == 4


def test_sizes_say_what_cards_cost_that_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffics, "ENOUGH", 200)
    rng, now, lines = random.Random(5), 0.0, []
    while now < 1200:
        now += rng.expovariate(0.1 if now < 800 else 2.0)
        lines.append({"due_s": now})
    (size,) = sizes(fleet(a=scaled(1, 9, cold_start_s=10.0)), traffic(*lines), 30.0, 10_000)
    assert size.replicas is not None
    assert size.scaled is not None
    assert (size.scaled.least, size.scaled.most) == (1, size.replicas)
    assert size.scaled.p95_s is not None
    assert size.scaled.worst_s is not None
    assert 2.0 < size.scaled.p95_s <= size.scaled.worst_s
    assert size.scaled.changes > 0
