"""What a calibration learns of a server, and how it is held against one: the server is a simulated one here."""

import random
from collections.abc import Sequence

import pytest
import yaml
from rich.console import Console

from loadtest.bench.calibration import Plan, Report
from loadtest.bench.calibration_fit import ALL, HELD, Overheads, compared, fleet_of, lines_of, overheads, paced
from loadtest.bench.calibration_report import as_json, files, headline, tables
from loadtest.samples import Arrival, Outcome, Sample
from loadtest.servers import Budget
from serve.bench.machine import this_machine
from serve.errors import OperatorError
from serve.jobs.terms import StepCurve, WorkerReport
from serve.simulate.fleet import Fleet
from serve.simulate.traffic import Line, Traffic, order_of
from serve.simulate.world import simulate

OWN = Overheads(trip_ms=4.0, text_ms=9.0, store_ms=31.0, decode_ms=900.0)
REPORT = WorkerReport(
    name="w",
    model="shapes",
    placement="p",
    max_pixels=192 * 192,
    max_rows=8,
    batch=4,
    vae_factor=8,
    curves=(
        StepCurve(height=16, width=16, ms={1: 12.0, 2: 16.0, 8: 44.0}),
        StepCurve(height=8, width=8, ms={1: 8.0, 8: 14.0}),
    ),
)
LOAD, SECONDS = 0.5, 30.0


def arrivals(count: int, seed: int) -> list[Arrival]:
    rng, now, found = random.Random(seed), 0.0, []
    for index in range(count):
        now += rng.expovariate(2.0)
        side = rng.choice((64, 128))
        body = {"width": side, "height": side, "num_inference_steps": rng.choice((4, 20)), "scheduler": "ddim"}
        found.append(
            Arrival(index=index, due_s=now, dialect="wait", body=body | {"guidance_scale": rng.choice((1.0, 7.0))})
        )
    return found


def sent(sending: Sequence[Arrival], fleet: Fleet) -> list[Sample]:
    """What a server that is like the fleet would have answered."""
    orders = [order_of(line, [fleet.shape("here")], n) for n, line in enumerate(lines_of(sending))]
    samples = []
    for arrival, fate in zip(sending, simulate(fleet, Traffic("t", SECONDS, orders)).fates, strict=True):
        assert fate.latency_s is not None
        assert fate.began_s is not None
        pixels = arrival.body["width"] * arrival.body["height"]
        decode_s = OWN.decode_ms * pixels / 1e9
        rest = fate.latency_s - (fate.began_s - fate.due_s) - (OWN.trip_ms + OWN.text_ms + OWN.store_ms) / 1000
        timings = {
            "queued_s": fate.began_s - fate.due_s + OWN.trip_ms / 1000,
            "text_s": OWN.text_ms / 1000,
            "steps_s": rest - decode_s,
            "decode_s": decode_s,
            "compress_s": None,
        }
        samples.append(
            Sample(
                index=arrival.index,
                dialect="wait",
                due_s=arrival.due_s,
                sent_s=arrival.due_s,
                ended_s=arrival.due_s + fate.latency_s,
                outcome=Outcome.DONE,
                status=200,
                job={"timings": timings, "request": dict(arrival.body)},
            )
        )
    return samples


FLEET = fleet_of(REPORT, OWN, "shapes")


def test_a_server_that_is_as_the_simulation_has_it_is_learned_from_other_orders() -> None:
    learned = overheads(sent(arrivals(60, 1), FLEET))
    for name in ("trip_ms", "text_ms", "store_ms", "decode_ms"):
        assert getattr(learned, name) == pytest.approx(getattr(OWN, name), rel=0.02), name
    _, pace = paced(FLEET, FLEET.shape("here"), arrivals(60, 1), sent(arrivals(60, 1), FLEET))
    assert pace == pytest.approx(1.0, abs=0.02)
    sending = arrivals(60, 2)
    found = compared(
        fleet_of(REPORT, learned, "shapes"), FLEET.shape("here"), sending, sent(sending, FLEET), LOAD, SECONDS
    )
    assert found.orders == 60
    assert all(abs(error) < 0.02 for error in found.errors.values())


def test_a_server_that_is_slower_than_it_says_is_told_as_such() -> None:
    sending = arrivals(40, 3)
    slower = FLEET.model_copy(update={"store_ms": 500.0})
    found = compared(FLEET, FLEET.shape("here"), sending, sent(sending, slower), LOAD, SECONDS)
    assert all(error < -0.15 for error in found.errors.values())
    assert "Missed" in _screen(_report(found))
    assert not as_json(_report(found))["within"]


def test_steps_that_take_longer_than_reported_are_learned_too() -> None:
    (curves,) = (pool.curves for pool in FLEET.pools.values())
    longer = tuple(each.model_copy(update={"ms": {n: 1.3 * ms for n, ms in each.ms.items()}}) for each in curves)
    slower = FLEET.with_pools({"here": FLEET.pools["here"].model_copy(update={"curves": longer})})
    others, sending = arrivals(60, 6), arrivals(60, 7)
    for run, some in ((others, ALL), (sending, HELD)):  # other orders of another run, or of the same
        learned, pace = paced(FLEET, FLEET.shape("here"), run, sent(run, slower))
        assert pace == pytest.approx(1.3, abs=0.02)
        found = compared(learned, FLEET.shape("here"), sending, sent(sending, slower), LOAD, SECONDS, pace, some)
        assert (found.pace, found.orders) == (pace, 60)
        assert all(abs(error) < 0.03 for error in found.errors.values())


def test_the_files_are_what_the_command_reads() -> None:
    sending = arrivals(10, 4)
    found = compared(FLEET, FLEET.shape("here"), sending, sent(sending, FLEET), LOAD, SECONDS)
    report = _report(found, lines_of(sending))
    assert report.within
    assert "+0.0%" in _screen(report)
    written = files(report)
    assert Fleet.model_validate(yaml.safe_load(written["fleet-0.5.yaml"])) == FLEET
    read = [Line.model_validate_json(line) for line in written["load-0.5.jsonl"].splitlines()]
    assert read == lines_of(sending)


def test_orders_that_were_not_drawn_are_no_comparison() -> None:
    sending = arrivals(3, 5)
    samples = sent(sending, FLEET)
    samples[1] = Sample(
        index=1, dialect="wait", due_s=0, sent_s=0, ended_s=1, outcome=Outcome.FAILED, status=500, detail="it broke"
    )
    with pytest.raises(OperatorError, match=r"1 of 3 orders were not drawn \(failed it broke\)"):
        compared(FLEET, FLEET.shape("here"), sending, samples, LOAD, SECONDS)
    with pytest.raises(OperatorError, match="no order was drawn"):
        overheads(samples[1:2])


def _report(found: object, lines: Sequence[Line] = ()) -> Report:
    plan = Plan(loads=[LOAD], seconds=SECONDS, learning_s=1.0, seed=0, budget=Budget(cores=(0,), torch_threads=1))
    own = {"overheads": OWN, "fleets": [FLEET], "compared": [found], "lines": [lines]}
    return Report(machine=this_machine(), plan=plan, capacity=4.0, **own)  # type: ignore[arg-type]


def _screen(report: Report) -> str:
    console = Console(width=160, record=True)
    console.print(headline(report))
    for table in tables(report):
        console.print(table)
    return console.export_text()
