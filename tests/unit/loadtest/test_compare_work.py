"""The arithmetic of the comparison: what an order weighs, what a window holds, what a lost order does to a tail."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from loadtest.bench.compare_work import (
    AROUND,
    faults,
    lost,
    mean_weight,
    saturated_rates,
    weight,
    weights,
    window,
)
from loadtest.samples import Outcome, Sample
from loadtest.tail import Tail

ORDER = {"num_inference_steps": 20, "guidance_scale": 7.5, "width": 128, "height": 128, "scheduler": "euler"}


def sample(index: int, due_s: float, ended_s: float, outcome: Outcome = Outcome.DONE, **more: object) -> Sample:
    fields = {"dialect": "wait", "sent_s": due_s, "status": 200} | more
    return Sample(index=index, due_s=due_s, ended_s=ended_s, outcome=outcome, **fields)  # type: ignore[arg-type]


def test_an_order_weighs_its_steps_rows_and_pixels() -> None:
    assert weight(ORDER) == 20 * 2 + AROUND
    assert weight(ORDER | {"guidance_scale": 1.0}) == 20 + AROUND
    assert weight(ORDER | {"width": 256}) == 2 * weight(ORDER)
    assert weight(ORDER | {"scheduler": "heun"}) == 39 * 2 + AROUND
    assert weights([ORDER, ORDER | {"width": 384}], mean_weight([ORDER, ORDER | {"width": 384}])) == [0.5, 1.5]
    with pytest.raises(KeyError):
        weight({name: value for name, value in ORDER.items() if name != "num_inference_steps"})
    with pytest.raises(ValueError):
        mean_weight([])


def closed_loop(work: Sequence[float], users: int, speed: float) -> list[Sample]:
    """What a server that shares `speed` work a second evenly among its users makes of a closed loop."""
    now, line, samples = 0.0, iter(range(len(work))), []
    under_way = {index: work[index] for index, _ in zip(line, range(users), strict=False)}
    while under_way:
        index = min(under_way, key=lambda each: under_way[each])
        share = under_way.pop(index)
        now += share * (len(under_way) + 1) / speed
        under_way = {each: left - share for each, left in under_way.items()}
        samples.append(sample(index, now, now))
        if (following := next(line, None)) is not None:
            under_way[following] = work[following]
    return samples


def test_a_saturated_rate_is_the_servers_whatever_the_window_catches() -> None:
    rng = np.random.default_rng(1)
    work = rng.uniform(0.2, 2.0, 400).tolist()
    rate, pieces = saturated_rates(closed_loop(work, 24, 5.0), work, 24)
    assert rate == pytest.approx(5.0, rel=0.05)
    assert len(pieces) == 3
    assert min(pieces) <= rate <= max(pieces)
    # Counted, the same run would depend on which orders came: one server's luck.
    heavy = [*(2.0 for _ in range(200)), *(0.2 for _ in range(200))]
    assert saturated_rates(closed_loop(heavy, 24, 5.0), heavy, 24)[0] == pytest.approx(5.0, rel=0.05)


def test_warm_up_and_the_end_of_the_line_are_no_part_of_a_rate() -> None:
    steady = [sample(index, 0.0, 10.0 + index) for index in range(40)]
    slow_start = [replace(one, ended_s=one.ended_s - 9.0) if one.index < 7 else one for one in steady]
    slow_end = [replace(one, ended_s=one.ended_s + 500.0) if one.index >= 32 else one for one in slow_start]
    assert saturated_rates(slow_end, [1.0] * 40, 8)[0] == pytest.approx(1.0)


def test_refused_orders_are_no_work_and_too_few_are_no_rate() -> None:
    done = [sample(index, 0.0, float(index)) for index in range(0, 60, 2)]
    refused = [sample(index, 0.0, float(index), Outcome.REFUSED) for index in range(1, 60, 2)]
    assert saturated_rates([*done, *refused], [1.0] * 60, 8)[0] == pytest.approx(0.5)
    with pytest.raises(ValueError):
        saturated_rates(done[:12], [1.0] * 60, 8)
    with pytest.raises(ValueError):
        saturated_rates([replace(one, ended_s=1.0) for one in done], [1.0] * 60, 8)


def test_a_lost_order_took_for_ever() -> None:
    latencies = np.random.default_rng(2).uniform(0.1, 3.0, 100).tolist()
    samples = [sample(index, 0.0, seconds) for index, seconds in enumerate(latencies)]
    whole = Tail.of(samples)
    assert (whole.p50, whole.p95, whole.p99, whole.worst) == pytest.approx(
        [*np.percentile(latencies, (50, 95, 99)), max(latencies)]
    )
    dropped = [replace(one, outcome=Outcome.REFUSED) if one.latency_s > 2.0 else one for one in samples]
    tail = Tail.of(dropped)
    assert tail.count == 100
    assert tail.p50 == pytest.approx(whole.p50)
    assert tail.p95 is None
    three = sorted(latencies)[-3:]
    few = [replace(one, outcome=Outcome.LATE) if one.latency_s in three else one for one in samples]
    assert Tail.of(few).p95 == pytest.approx(whole.p95)
    assert Tail.of(few).p99 is None
    assert Tail.of([]) == Tail(count=0, p50=None, p95=None, p99=None, worst=None)


def test_a_window_counts_what_arrives_in_it_and_what_was_due_in_it() -> None:
    samples = [
        sample(0, 0.0, 2.0),  # before
        sample(1, 1.0, 6.0),  # accepted before, arrives in it
        sample(2, 5.0, 7.0, sent_s=5.5),
        sample(3, 6.0, 14.9),  # too late to be of use
        sample(4, 7.0, 7.02, Outcome.REFUSED, sent_s=7.01, status=503),
        sample(5, 8.0, 16.0),  # arrives after
        sample(6, 9.0, 12.0, Outcome.FAILED, status=500, detail="no memory"),
        sample(7, 15.0, 15.01, Outcome.REFUSED, status=503),  # after
    ]
    work = [1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0]
    found = window(samples, work, 5.0, 15.0, 8.0)
    assert found.seconds == 10.0
    assert found.offered == pytest.approx(0.7)
    assert found.throughput == pytest.approx(0.6)
    assert found.goodput == pytest.approx(0.3)
    assert found.images_s == pytest.approx(0.2)
    assert found.tail.count == 5
    assert found.refused == 1
    assert found.refusals is not None
    assert found.refusals_own is not None
    assert found.refusals.p50 == pytest.approx(0.02)
    assert found.refusals_own.p50 == pytest.approx(0.01)
    assert found.lost == {"failed 500: no memory": 1}
    assert found.sent_late_s is not None
    assert 0.4 < found.sent_late_s <= 0.5
    with pytest.raises(ValueError):
        window(samples, work, 5.0, 5.0, 8.0)
    empty = window(samples, work, 20.0, 30.0, 8.0)
    assert (empty.goodput, empty.refusals, empty.sent_late_s) == (0.0, None, None)


def test_faults_are_neither_refusals_nor_late() -> None:
    samples = [sample(index, 0.0, 1.0, outcome, status=0) for index, outcome in enumerate(Outcome)]
    assert faults(samples) == 3
    assert lost(samples) == {"invalid": 1, "failed": 1, "late": 1, "left": 1, "broken": 1}
