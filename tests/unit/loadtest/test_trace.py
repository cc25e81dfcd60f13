"""A workload and a seed make a trace: when requests are due, what they ask for, who leaves."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.obedient_server import MODEL

from loadtest.trace import Catalog, catalog_of, due_times, read_catalog, trace
from loadtest.workload import Burst, Closed, Diurnal, HangUps, Images, Poisson, Workload, load, names
from serve.errors import OperatorError
from serve.models import resolve
from serve.settings.pools import ModelSettings

FIELDS = {
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "width",
    "height",
    "scheduler",
    "seed",
}
CLOCKS = st.one_of(
    st.builds(Poisson, rate=st.floats(0.1, 50)),
    st.builds(Burst, rate=st.floats(0.1, 50), on_s=st.floats(0.5, 9), off_s=st.floats(0.5, 9)),
    st.builds(Diurnal, rate=st.floats(0.1, 50), swing=st.floats(0, 1)),
)


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return read_catalog("http://here", 200, json.dumps({"data": [MODEL]}).encode())


def workload(**parts: Any) -> Workload:
    return Workload(**{"name": "mine", "description": "", "arrivals": Poisson(rate=10.0), "duration_s": 20.0} | parts)


@given(CLOCKS, st.floats(1, 60), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_due_times_are_of_the_run_in_order_and_as_many_as_the_rate_says(
    arrivals: Poisson | Burst | Diurnal, seconds: float, seed: int
) -> None:
    assert arrivals.rate is not None
    mine = workload(arrivals=arrivals, duration_s=seconds)
    times = due_times(mine, seed)
    assert list(times) == sorted(times)
    assert 0 <= times[0] <= times[-1] < seconds + 1e-6
    assert len(times) == max(1, round(arrivals.rate * seconds))
    assert times == due_times(mine, seed)
    if len(times) > 3:
        assert times != due_times(mine, seed + 1)
    if isinstance(arrivals, Burst):
        period = arrivals.on_s + arrivals.off_s
        assert all(time % period <= arrivals.on_s + 1e-6 or period - time % period < 1e-6 for time in times)


def test_a_day_is_quiet_at_night_and_busy_in_its_middle() -> None:
    times = due_times(workload(arrivals=Diurnal(rate=100, swing=0.8), duration_s=100), 1)
    night = sum(time < 10 or time >= 90 for time in times)
    day = sum(40 <= time < 60 for time in times)
    assert 6 < day / night < 13, "1 - 0.8 * 0.94 of the mean against 1 + 0.8 * 0.94"


def test_the_seed_fixes_a_trace_and_its_orders_are_mixed(catalog: Catalog) -> None:
    for name in names():
        mine = load(name).for_capacity(4.0)
        arrivals = trace(mine, 7, catalog)
        assert [arrival.index for arrival in arrivals] == list(range(len(arrivals)))
        assert {arrival.dialect for arrival in arrivals} == set(mine.dialects)
    mixed = load("mixed").for_capacity(4.0)
    arrivals = trace(mixed, 7, catalog)
    assert arrivals == trace(mixed, 7, catalog) != trace(mixed, 8, catalog)
    bodies = [arrival.body for arrival in arrivals]
    assert all(set(body) == FIELDS for body in bodies)
    steps = {body["num_inference_steps"] for body in bodies}
    assert steps == {4, 8, 12, 20, 30, 50}
    guidance = [body["guidance_scale"] for body in bodies]
    assert 0.05 < sum(value == 1.0 for value in guidance) / len(guidance) < 0.3
    assert all(value == 1.0 or 1.5 <= value <= 12 for value in guidance)
    assert {(body["width"], body["height"]) for body in bodies} == {(128, 128), (152, 104), (104, 152), (168, 96)}
    assert {body["scheduler"] for body in bodies} == {"dpmpp_2m_karras", "euler_a", "ddim", "unipc", "euler"}
    assert len({body["seed"] for body in bodies}) == len(bodies)


def test_a_seed_sweep_is_one_order_with_many_seeds(catalog: Catalog) -> None:
    bodies = [dict(arrival.body) for arrival in trace(load("seed-sweep"), 1, catalog)]
    assert len({body.pop("seed") for body in bodies}) == 64
    assert all(body == bodies[0] for body in bodies)


def test_who_hangs_up_is_a_share_and_changes_nothing_else(catalog: Catalog) -> None:
    mine = workload(hang_ups=HangUps(share=0.3, after_s=(0.5, 1.0)))
    arrivals = trace(mine, 1, catalog)
    leaving = [arrival.hang_up_s for arrival in arrivals if arrival.hang_up_s is not None]
    assert 0.2 < len(leaving) / len(arrivals) < 0.4
    assert all(0.5 <= after <= 1.0 for after in leaving)
    assert [arrival.body for arrival in arrivals] == [arrival.body for arrival in trace(workload(), 1, catalog)]


def test_what_the_target_has_not_is_one_line(catalog: Catalog) -> None:
    with pytest.raises(OperatorError, match=r"mine: images.model: dalle is not one of shapes"):
        trace(workload(images=Images(model="dalle")), 1, catalog)
    with pytest.raises(OperatorError, match="mine: images: shapes has none of the samplers lcm"):
        trace(workload(images=Images(samplers=("lcm",))), 1, catalog)
    with pytest.raises(OperatorError, match="mine: images: shapes has none of the aspect ratios 7:1"):
        trace(workload(images=Images(ratios=("7:1",))), 1, catalog)
    with pytest.raises(OperatorError, match="its rate is 2 times a capacity"):
        trace(workload(arrivals=Poisson(load=2)), 1, catalog)
    named = trace(workload(images=Images(model="shapes", sizes=((64, 64),), steps=(3,))), 1, catalog)
    assert {(a.body["model"], a.body["width"], a.body["num_inference_steps"]) for a in named} == {("shapes", 64, 3)}


def test_what_is_no_tandem_server_is_one_line() -> None:
    for status, content in ((404, b"nothing"), (200, b"[]"), (200, b'{"data": [{"id": 1}]}')):
        with pytest.raises(OperatorError, match="--target: http://here is no Tandem server"):
            read_catalog("http://here", status, content)
    with pytest.raises(OperatorError, match="--key: http://here wants another API key"):
        read_catalog("http://here", 401, b"{}")
    with pytest.raises(OperatorError, match="draws with no model"):
        read_catalog("http://here", 200, b'{"data": []}')


def test_a_closed_loop_has_as_many_orders_as_it_says(catalog: Catalog, tmp_path: Path) -> None:
    arrivals = trace(workload(arrivals=Closed(users=3, orders=11)), 1, catalog)
    assert len(arrivals) == 11
    folder = catalog_of(resolve(ModelSettings(), tmp_path))
    assert set(folder) == {"shapes"}
    counts = Counter(arrival.body["scheduler"] for arrival in trace(workload(), 1, folder))
    assert len(counts) > 3
