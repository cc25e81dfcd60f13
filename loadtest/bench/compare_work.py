"""The arithmetic of `tandem bench compare`: what an order weighs, what a window holds, percentiles that lost requests
count in. No clock, no server."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.samples import Outcome, Sample
from loadtest.tail import Tail
from serve.bench.stats import Percentiles
from serve.models.samplers import forwards_of

AROUND = 4
"""What surrounds the steps of a picture (text, decoding, PNG), in forward passes of one batch row at its size: about
two guided steps of the shipped model (`tandem bench engine`: decoding beside a step)."""
PARTS = 3
"""Pieces of a saturated window whose rates show how steady it was."""

_FAULTS = (Outcome.FAILED, Outcome.INVALID, Outcome.BROKEN)


def weight(order: Mapping[str, Any]) -> float:
    """The work of an order, in forward passes of one row of 128 x 128 pixels: steps x rows (2 with guidance, else 1) x
    pixels, and `AROUND`.

    It evens out what falls on the edges of a window; nobody is credited with anything by it. Raises KeyError for an
    order that leaves one of these to the server's defaults: each server has its own.
    """
    rows = 2 if order["guidance_scale"] > 1 else 1
    passes = forwards_of(order["scheduler"], order["num_inference_steps"])
    pixels: int = order["width"] * order["height"]
    return (passes * rows + AROUND) * pixels / 128**2


def weights(orders: Sequence[Mapping[str, Any]], unit: float) -> list[float]:
    """In units of `unit`, the mean work of an order of the mix: rates in it are images of the mix a second."""
    return [weight(order) / unit for order in orders]


def mean_weight(orders: Sequence[Mapping[str, Any]]) -> float:
    """Raises ValueError for no orders."""
    if not orders:
        raise ValueError("the mean of no orders")
    return sum(map(weight, orders)) / len(orders)


def saturated_rates(samples: Sequence[Sample], work: Sequence[float], users: int) -> tuple[float, list[float]]:
    """Work a second of a closed loop in which `users` orders were always under way; and of each of `PARTS` pieces.

    Counted from one picture to another, as answers come in batches: from the `users`th (those before it warm up) to the
    last but `users` (then the line runs dry). What is under way at both ends cancels, up to the batch. Raises
    ValueError where too few pictures came.
    """
    done = sorted((sample for sample in samples if sample.outcome is Outcome.DONE), key=lambda sample: sample.ended_s)
    window = [(sample.ended_s, work[sample.index]) for sample in done[users - 1 : -users]]
    if len(window) < 2 * PARTS:
        raise ValueError(f"{len(done)} pictures are too few to tell a rate of {users} users")
    edges = [round(part * (len(window) - 1) / PARTS) for part in range(PARTS + 1)]
    pieces = (window[first : last + 1] for first, last in itertools.pairwise(edges))
    return rate_of(window), [rate_of(piece) for piece in pieces]


def rate_of(window: Sequence[tuple[float, float]]) -> float:
    """Work a second of pictures that ended (time, work), in order: the first opens the window and is no part of it.
    Raises ValueError where no time passed."""
    seconds = window[-1][0] - window[0][0] if window else 0.0
    if seconds <= 0:
        raise ValueError("no rate from pictures that came all at once")
    return sum(work for _, work in window[1:]) / seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What came of a span of a run. `offered`, `throughput` and `goodput` are work a second: of the orders that were
    due in it, of the pictures that arrived in it, and of those among them that arrived within the deadline.
    `images_s` counts the latter without weights. `tail` and the refusals are of the orders that were due in it:
    `refusals` from the intended send time, `refusals_own` from the moment at which they were really sent. `lost` are
    the orders without a picture that were not refused either, by reason. `sent_late_s` is the 99th percentile of how
    long after its intended time an order was sent: what the client itself adds to every latency."""

    seconds: float
    offered: float
    throughput: float
    goodput: float
    images_s: float
    tail: Tail
    refused: int
    refusals: Percentiles | None
    refusals_own: Percentiles | None
    lost: Mapping[str, int]
    sent_late_s: float | None


def window(samples: Sequence[Sample], work: Sequence[float], begin_s: float, end_s: float, deadline_s: float) -> Window:
    """Of the run's seconds `begin_s` to `end_s`. Pictures count when they arrive: what was accepted before the window
    and arrives in it stands for what is accepted in it and arrives later. Raises ValueError for an empty span."""
    if end_s <= begin_s:
        raise ValueError(f"a window from {begin_s} s to {end_s} s")
    due = [sample for sample in samples if begin_s <= sample.due_s < end_s]
    arrived = [one for one in samples if one.outcome is Outcome.DONE and begin_s <= one.ended_s < end_s]
    good = [one for one in arrived if one.latency_s <= deadline_s]
    refused = [sample for sample in due if sample.outcome is Outcome.REFUSED]
    seconds = end_s - begin_s
    return Window(
        seconds=seconds,
        offered=sum(work[one.index] for one in due) / seconds,
        throughput=sum(work[one.index] for one in arrived) / seconds,
        goodput=sum(work[one.index] for one in good) / seconds,
        images_s=len(good) / seconds,
        tail=Tail.of(due),
        refused=len(refused),
        refusals=Percentiles.of([one.latency_s for one in refused]) if refused else None,
        refusals_own=Percentiles.of([one.ended_s - one.sent_s for one in refused]) if refused else None,
        lost=lost(due),
        sent_late_s=Percentiles.of([one.sent_s - one.due_s for one in due]).p99 if due else None,
    )


def lost(samples: Sequence[Sample]) -> dict[str, int]:
    """Orders without a picture that were not told to come again, by reason."""
    none = (one for one in samples if one.outcome not in (Outcome.DONE, Outcome.REFUSED))
    return dict(Counter(reason(one) for one in none))


def reason(sample: Sample) -> str:
    told = f" {sample.status}" if sample.status else ""
    return f"{sample.outcome}{told}: {sample.detail}"[:200] if sample.detail else f"{sample.outcome}{told}"


def faults(samples: Sequence[Sample]) -> int:
    """Orders that went wrong: neither answered, refused nor late."""
    return sum(sample.outcome in _FAULTS for sample in samples)
