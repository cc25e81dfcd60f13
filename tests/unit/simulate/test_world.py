"""A simulated fleet against arithmetic, queueing theory and the promises of the queue."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from serve.errors import OperatorError
from serve.memory.shapes import published
from serve.simulate.fleet import Fleet
from serve.simulate.outcome import Outcome
from serve.simulate.scale import part, run
from serve.simulate.shards import shards
from serve.simulate.sizing import sizes
from serve.simulate.traffic import Line, Traffic, busiest, order_of, thinned
from serve.simulate.world import simulate

SHAPES = [published()["sdxl"]]
STEP_MS, DECODE_MS = 100.0, 20.0


def fleet(*, text_ms: float = 0.0, jobs: dict[str, Any] | None = None, **pools: dict[str, Any]) -> Fleet:
    """Pools of SDXL whose steps take 100 ms with one image and 160 with two, and one image at a time by default."""
    curve = {"width": 1024, "height": 1024, "ms": {2: STEP_MS, 4: 160.0}, "cap": 4}
    usual = {
        "model": "sdxl",
        "gpu_class": "24gb",
        "replicas": 1,
        "curves": [curve],
        "decode_ms_per_megapixel": DECODE_MS / 1.048576,
        "diffusion": {"max_batch_size": 1, "max_rows": 1},
    }
    found = {name: usual | own for name, own in (pools or {"a": {}}).items()}
    bounds = {"max_queued": 10_000, "max_queued_s": 1e6} | (jobs or {})
    return Fleet.model_validate({"pools": found, "text_ms": text_ms, "store_ms": 0, "trip_ms": 0.001, "jobs": bounds})


def traffic(*lines: dict[str, Any]) -> Traffic:
    orders = [order_of(Line.model_validate({"steps": 10} | line), SHAPES, n) for n, line in enumerate(lines)]
    return Traffic("t", max(1.0, orders[-1].due_s), orders)


def poisson(rate: float, count: int, **line: Any) -> Traffic:
    rng, now, lines = random.Random(7), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        lines.append({"due_s": now} | line)
    return traffic(*lines)


def latencies(found: Outcome) -> Sequence[float]:
    return [fate.latency_s or -1.0 for fate in found.fates]


def test_one_order_takes_its_text_its_steps_and_its_decoding() -> None:
    found = simulate(fleet(text_ms=7.0), traffic({"due_s": 0.5, "steps": 12}))
    assert latencies(found) == pytest.approx([(7 + 12 * STEP_MS + DECODE_MS) / 1000], abs=1e-4)
    assert found.pools[0].images == 1
    assert found.pools[0].busy == pytest.approx(1.2 / found.end_s)


def test_who_comes_joins_after_the_step_under_way_and_both_then_share_theirs() -> None:
    two = {"diffusion": {"max_batch_size": 2, "max_rows": 2}}
    found = simulate(fleet(a=two), traffic({"due_s": 0.0}, {"due_s": 0.25}))
    first = 3 * STEP_MS + 7 * 160 + DECODE_MS
    second = 300 + 7 * 160 + 3 * STEP_MS + DECODE_MS - 250
    assert latencies(found) == pytest.approx([first / 1000, second / 1000], abs=1e-3)


@pytest.mark.slow
def test_waiting_for_one_server_is_that_of_the_theory() -> None:
    """M/D/1: the mean wait is load x service / 2 (1 - load) (Pollaczek, Khinchine); a row is free once decoded."""
    service_s, load = 1.02, 0.7
    found = simulate(fleet(), poisson(load / service_s, 20_000))
    assert found.counts == {"done": 20_000}
    assert found.waiting_s == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.06)


def test_who_floods_the_queue_waits_for_themselves() -> None:
    flood = [{"due_s": 0.001 * n, "owner": "flood"} for n in range(60)]
    late = {"due_s": 5.0, "owner": "modest"}
    found = simulate(fleet(), traffic(*flood, late))
    assert found.fates[-1].owner == "modest"
    assert latencies(found)[-1] < 3 * 1.02
    assert max(latencies(found)) > 55


def test_what_a_lost_replica_held_is_drawn_by_another_after_its_lease() -> None:
    own = {"replicas": 3, "mtbf_h": 0.02, "cold_start_s": 5.0}
    found = simulate(fleet(a=own), poisson(1.0, 400))
    again = [fate for fate in found.fates if fate.attempts > 1 and fate.ended == "done"]
    assert found.pools[0].lost > 3
    assert set(found.counts) <= {"done", "failed"}
    assert len(again) > 3
    assert min(fate.latency_s or 0.0 for fate in again) > 10 * 2 / 3


def test_a_pool_that_begins_empty_draws_after_its_start() -> None:
    found = simulate(fleet(a={"from_zero": True, "cold_start_s": 30.0}), traffic({"due_s": 1.0}))
    assert latencies(found)[0] == pytest.approx(30 - 1 + 1.02, abs=0.01)


def test_large_work_goes_where_it_fits_and_what_fits_nowhere_is_refused() -> None:
    small, large = ({"diffusion": {"max_batch_size": 1, "max_rows": 1, "max_pixels": side**2}} for side in (1024, 1536))
    wide = {"width": 1536, "height": 1536}
    orders = traffic({"due_s": 0.0} | wide, {"due_s": 0.0}, {"due_s": 0.1, "width": 2048, "height": 2048})
    found = simulate(fleet(small=small, large=large), orders)
    assert [fate.ended for fate in found.fates] == ["done", "done", "refused"]
    assert {pool.name: pool.images for pool in found.pools} == {"small": 1, "large": 1}


def test_a_full_queue_refuses_and_old_orders_expire() -> None:
    found = simulate(fleet(jobs={"max_queued": 5, "queue_ttl_s": 3.5}), traffic(*({"due_s": 0.0} for _ in range(10))))
    assert found.counts["refused"] == 4
    assert found.counts["expired"] == 2
    assert found.latency_s(95) is None


def test_the_same_seed_is_the_same_day() -> None:
    own, orders = fleet(a={"replicas": 3, "mtbf_h": 0.01}), poisson(2.0, 100)
    assert latencies(simulate(own, orders, 1)) == latencies(simulate(own, orders, 1))
    assert latencies(simulate(own, orders, 1)) != latencies(simulate(own, orders, 2))


@pytest.mark.slow
def test_a_slice_tells_of_the_whole() -> None:
    own, orders = fleet(a={"replicas": 32}), poisson(24.0, 3000)
    whole, one = run(own, orders, 10_000), run(own, orders, 800)
    assert (whole.slices, one.slices, part(own, 4).pools["a"].replicas) == (1, 4, 8)
    assert one.pools[0].busy == pytest.approx(whole.pools[0].busy, rel=0.1)
    assert one.redis.share == pytest.approx(whole.redis.share, rel=0.2)
    assert (whole.latency_s(95) or 9) <= (one.latency_s(95) or 0) * 1.02


def test_redis_is_full_at_the_growth_that_is_told() -> None:
    own, orders = fleet(a={"replicas": 8}), poisson(4.0, 200)
    once, double = simulate(own, orders).redis, simulate(fleet(a={"replicas": 16}), poisson(8.0, 400)).redis
    assert once.linear * once.growth + once.square * once.growth**2 == pytest.approx(1)
    assert double.linear == pytest.approx(2 * once.linear, rel=0.2)
    assert double.square == pytest.approx(4 * once.square, rel=0.4)
    assert once.of_shard(1.0, 1) == pytest.approx(once.share)
    assert once.of_shard(0.5, 2) < once.share / 2


def test_as_many_cards_as_it_takes_and_no_fewer() -> None:
    own, orders = fleet(a={"replicas": 1}), poisson(2.0, 120)
    (size,) = sizes(own, orders, 2.0, 10_000)
    assert size.replicas is not None
    rush = busiest(orders, 300.0)
    least, fewer = (
        simulate(own.with_replicas({"a": number}), rush).latency_s(95) for number in (size.replicas, size.replicas - 1)
    )
    assert least is not None
    assert least <= 2.0
    assert fewer is None or fewer > 2.0


def test_no_number_of_cards_makes_one_faster() -> None:
    (size,) = sizes(fleet(), poisson(1.0, 100), 0.5, 10_000)
    assert size.replicas is None
    assert "1.0 s" in size.why


def test_shards_part_tenants_and_the_busiest_is_told() -> None:
    lines = [{"due_s": 0.5 * n, "owner": "big" if n % 2 else f"t{n % 16}"} for n in range(200)]
    own = fleet(a={"replicas": 4})
    found = shards(own, traffic(*lines), simulate(own, traffic(*lines)), 10_000)
    assert [each.number for each in found] == [1, 2, 4]
    assert found[0].share == 1
    assert found[1].share >= 0.5
    assert found[2].redis < found[0].redis


def test_the_busiest_time_is_found_and_thinning_keeps_the_share() -> None:
    calm, rush = ([{"due_s": start + n * every} for n in range(100)] for start, every in ((0.0, 30.0), (3000.0, 2.0)))
    found = busiest(traffic(*calm, *rush, {"due_s": 6000.0}), 400.0)
    assert len(found.orders) > 90
    assert len(thinned(poisson(1.0, 2000), 0.25).orders) == pytest.approx(500, rel=0.15)


@pytest.mark.parametrize(
    ("pool", "what"),
    [
        ({"gpu_class": "5gb"}, "classes: there is no 5gb"),
        ({"diffusion": {"max_batch_size": 0}}, "pools.a.diffusion.max_batch_size"),
        ({"replicas": 0}, "none has replicas"),
    ],
)
def test_what_is_wrong_with_a_fleet_is_named(pool: dict[str, Any], what: str) -> None:
    with pytest.raises(OperatorError, match=what):
        simulate(fleet(a=pool), traffic({"due_s": 0.0}))
