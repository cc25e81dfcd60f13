"""The simulation beside a measured run: what it has to know of the server, taken from other orders than those that it
is held against, and the two side by side.

How fast the machine is at the moment is one number, the pace, and it is one that drifts. So it is taken from every
second order of the very run, by the mean of their times, and what is compared are the percentiles of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from loadtest.samples import Arrival, Outcome, Sample
from serve.errors import OperatorError
from serve.jobs.terms import WorkerReport
from serve.memory.terms import ModelShape
from serve.simulate.fleet import Fleet
from serve.simulate.fleet_parts import CardClass, Curve, Pool
from serve.simulate.traffic import Line, Traffic, order_of
from serve.simulate.world import simulate

PERCENTS = (50, 95)
FREE = 0.1
"""The share of the orders whose wait for a claim is taken for that of a replica with free rows."""
_BEFORE = ("queued_s", "claim_s", "text_s", "batch_s", "steps_s", "decode_wait_s", "decode_s")
"""Stages of a job between its order and its decoded picture."""
PACES, CLOSE = (0.5, 2.0), 0.002
"""Between which the pace is looked for, and how closely."""
ALL, LEARNED, HELD = slice(None), slice(0, None, 2), slice(1, None, 2)
"""Of a run's orders: those that the pace is taken from, and those that are compared."""
MEMORY_GB = 64.0
"""Of the class that stands for the CPU: memory is no bound of the shipped model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Milliseconds around an order's steps, each the mean of the jobs of a run. `trip_ms` is a claim by a replica that
    has a free row; `store_ms` all that the client waits for beside what goes before: the order's way to the queue, the
    picture's file, its way to the store and back to the client. `decode_ms` is of a megapixel."""

    trip_ms: float
    text_ms: float
    store_ms: float
    decode_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One open loop at `load` times the capacity, measured and simulated: seconds by percentile. `orders` were sent,
    `done` answered; `pace` is what a millisecond of the reported steps really took."""

    load: float
    pace: float
    rate: float
    orders: int
    done: int
    measured_s: Mapping[int, float]
    simulated_s: Mapping[int, float]

    @property
    def errors(self) -> Mapping[int, float]:
        """By percentile, of the measured value: above 0 the simulation is slower."""
        return {each: self.simulated_s[each] / self.measured_s[each] - 1 for each in self.measured_s}


def overheads(samples: Sequence[Sample]) -> Overheads:
    """Of the jobs that were drawn. Raises OperatorError where none was."""
    drawn = [sample for sample in samples if sample.outcome is Outcome.DONE and sample.job]
    if not drawn:
        raise OperatorError("calibration: no order was drawn")
    stages = [_stages(sample) for sample in drawn]
    megapixels = sum(_pixels(sample) for sample in drawn) / 1e6
    waits = sorted(each["queued_s"] for each in stages)
    around = [
        sample.latency_s - sum(each[name] for name in _BEFORE) for sample, each in zip(drawn, stages, strict=True)
    ]
    return Overheads(
        trip_ms=1000 * (waits[int(FREE * len(waits))] + fmean(each["claim_s"] for each in stages)),
        text_ms=1000 * fmean(each["text_s"] for each in stages),
        store_ms=1000 * max(0.0, fmean(around)),
        decode_ms=1000 * sum(each["decode_s"] for each in stages) / megapixels,
    )


def fleet_of(report: WorkerReport, found: Overheads, model: str) -> Fleet:
    """The server's one replica as it reports itself. `model` is its source."""
    factor = report.vae_factor
    curves = [
        Curve(width=factor * each.width, height=factor * each.height, ms=dict(each.ms))
        for each in report.curves
        if each.ms
    ]
    pool = Pool(
        model=model,
        gpu_class="cpu",
        replicas=1,
        diffusion={"max_batch_size": report.batch, "max_rows": report.max_rows, "max_pixels": report.max_pixels},
        curves=tuple(curves),
        decode_ms_per_megapixel=max(found.decode_ms, 1e-3),
    )
    return Fleet(
        description="one replica, as a server measured itself",
        classes={"cpu": CardClass(memory_gb=MEMORY_GB, dtypes=("float32",))},
        pools={"here": pool},
        jobs={"max_queued": 100_000, "max_queued_s": 1e6},
        text_ms=found.text_ms,
        store_ms=found.store_ms,
        trip_ms=max(found.trip_ms, 1e-3),
    )


def paced(
    fleet: Fleet, shape: ModelShape, arrivals: Sequence[Arrival], samples: Sequence[Sample], some: slice = LEARNED
) -> tuple[Fleet, float]:
    """With steps as much slower, or faster, as has some of these orders take the time on average that they took; and by
    how much. A replica reports what its steps took in the beginning, and not what passes between two of them."""
    measured_s = fmean(sample.latency_s for sample in samples[some] if sample.outcome is Outcome.DONE)
    traffic = _traffic(arrivals, shape, arrivals[-1].due_s)
    low, high = PACES
    while high - low > CLOSE:
        pace = (low + high) / 2
        fates = simulate(_at(fleet, pace), traffic).fates[some]
        taken = [fate.latency_s for fate in fates if fate.latency_s is not None]
        low, high = (pace, high) if fmean(taken) < measured_s else (low, pace)
    found = round((low + high) / 2, 3)
    return _at(fleet, found), found


def _at(fleet: Fleet, pace: float) -> Fleet:
    (name, pool), *_ = fleet.pools.items()
    curves = tuple(
        curve.model_copy(update={"ms": {lanes: pace * ms for lanes, ms in curve.ms.items()}}) for curve in pool.curves
    )
    return fleet.with_pools({name: pool.model_copy(update={"curves": curves})})


def lines_of(arrivals: Sequence[Arrival]) -> list[Line]:
    """The trace as `tandem simulate` reads it."""
    return [
        Line(
            due_s=arrival.due_s,
            width=arrival.body["width"],
            height=arrival.body["height"],
            steps=arrival.body["num_inference_steps"],
            guided=arrival.body["guidance_scale"] > 1,
            scheduler=arrival.body["scheduler"],
        )
        for arrival in arrivals
    ]


def compared(
    fleet: Fleet,
    shape: ModelShape,
    arrivals: Sequence[Arrival],
    samples: Sequence[Sample],
    load: float,
    duration_s: float,
    pace: float = 1.0,
    some: slice = ALL,
) -> Compared:
    """The same orders at the same moments, and the percentiles of some of them. Raises OperatorError where an order was
    not drawn: the two could not be held against each other."""
    lost = [sample for sample in samples if sample.outcome is not Outcome.DONE]
    if lost or not samples:
        what = f"{lost[0].outcome} {lost[0].detail}".strip() if lost else "none was sent"
        raise OperatorError(f"calibration: {len(lost)} of {len(samples)} orders were not drawn ({what})")
    found = simulate(fleet, _traffic(arrivals, shape, duration_s))
    taken = [fate.latency_s for fate in found.fates[some] if fate.latency_s is not None]
    return Compared(
        load=load,
        pace=pace,
        rate=len(arrivals) / duration_s,
        orders=len(arrivals),
        done=len(samples),
        measured_s=_percentiles([sample.latency_s for sample in samples[some]]),
        simulated_s=_percentiles(taken),
    )


def _traffic(arrivals: Sequence[Arrival], shape: ModelShape, duration_s: float) -> Traffic:
    orders = [order_of(line, [shape], number) for number, line in enumerate(lines_of(arrivals))]
    return Traffic("calibration", duration_s, orders)


def _percentiles(taken: Sequence[float]) -> dict[int, float]:
    return {percent: float(np.percentile(taken, percent)) for percent in PERCENTS}


def _stages(sample: Sample) -> dict[str, float]:
    """Those of `_BEFORE`; 0 for one that the job had not."""
    told: Mapping[str, Any] = (sample.job or {}).get("timings") or {}
    return {name: float(told.get(name) or 0.0) for name in _BEFORE}


def _pixels(sample: Sample) -> int:
    request: Mapping[str, Any] = (sample.job or {})["request"]
    return int(request["width"]) * int(request["height"])
