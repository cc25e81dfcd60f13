"""The same texts at the same times through two servers of one model: one with its cache, one whose cache is off."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from loadtest.bench.cache_meter import Meter
from loadtest.driver import drive
from loadtest.prompts import Wording
from loadtest.samples import Arrival, Outcome, Sample
from loadtest.tail import Tail
from loadtest.workload import Prompts, Zipf
from serve.bench.load import steady_rate
from serve.bench.shapes import SHAPES, model_of
from serve.bench.stats import Percentiles, Spread, poisson_arrivals
from serve.domain.text import Tier
from serve.errors import OperatorError

ON: Mapping[str, Mapping[str, object]] = {}
OFF: Mapping[str, Mapping[str, object]] = {"cache": {"memory_bytes": 0}}
"""No process keeps an embedding; `encoder.redis` false beside it, and Redis has none either. What two requests need at
the same time is still encoded once: that is no cache, and the server can't be told otherwise."""
A = 1.0
TEXTS = 100
"""Different texts."""
LOAD = 0.8
"""Of what the server without a cache was measured to carry."""
FULL = 8
"""Requests at once that fill it."""
_GIVE_UP_S = 300.0
_ENOUGH = 5000
"""Requests, more than a server answers while its capacity is measured."""

Serve = Callable[[Path, Mapping[str, Mapping[str, object]]], AbstractAsyncContextManager[str]]
"""Starts a server of a model folder with these groups of settings, gives its address when it is ready, and ends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedPlan:
    """`encoder` is a shape's name. `seconds` is the length of each open loop, of which there are two in a round.
    `threads` are each encoder's on a CPU."""

    encoder: str
    rounds: int
    seconds: float
    threads: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One open loop; latency in seconds from when a request was due, one that was not answered counted as endless.
    `hits` is the share of the units of answers that came from the cache, `hit_seconds` are of the answers of which all
    did. `failed` by reason."""

    seconds: Tail
    hit_seconds: Percentiles | None
    hits: float | None
    failed: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """`requests` of `texts` different texts, the same at the same times through both sides."""

    requests: int
    texts: int
    cached: Side
    plain: Side


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """`capacity` and `rate` are in requests a second; the capacity is that of the server without a cache."""

    encoders: tuple[str, ...]
    capacity: float
    rate: float
    rounds: tuple[Round, ...]

    def ratio(self, percentile: str) -> Spread | None:
        """`p50` or `p95` with the cache over the one without, by round. None where one of them is endless."""
        both = [
            (getattr(one.cached.seconds, percentile), getattr(one.plain.seconds, percentile)) for one in self.rounds
        ]
        if not both or any(None in pair for pair in both):
            return None
        return Spread.of([with_ / without for with_, without in both])

    def seconds(self, side: str, percentile: str) -> Spread | None:
        """`cached` or `plain`, over the rounds. None where one of them is endless."""
        found = [getattr(getattr(one, side).seconds, percentile) for one in self.rounds]
        return Spread.of(found) if found and None not in found else None


Tell = Callable[[str], None]


async def measure_paired(plan: PairedPlan, serve: Serve, tell: Tell) -> Paired:
    """Both servers are up all the time, and one at a time is asked. Each round begins with an empty cache. Raises
    OperatorError."""
    from serve.bench.weights import write_model

    shapes = model_of(SHAPES[plan.encoder])
    with tempfile.TemporaryDirectory(prefix="tl-") as scratch:
        folders = [Path(scratch) / side / "model" for side in ("cached", "plain")]
        for folder in folders:
            folder.parent.mkdir()
        tell(f"writing {' and '.join(shape.name for shape in shapes)}")
        folders[0].mkdir()
        write_model(shapes, plan.seed, folders[0])
        shutil.copytree(folders[0], folders[1], copy_function=os.link)
        tell("starting two servers")
        async with (
            serve(folders[0], _settings(plan, cached=True)) as cached,
            serve(folders[1], _settings(plan, cached=False)) as plain,
            Meter(cached) as meter,
        ):
            capacity = await _capacity(plan, plain, tell)
            rounds = []
            for number in range(plan.rounds):
                await meter.empty()
                await meter.ready()
                rounds.append(await _round(plan, LOAD * capacity, number, cached, plain, tell))
    return Paired(
        encoders=tuple(shape.name for shape in shapes), capacity=capacity, rate=LOAD * capacity, rounds=tuple(rounds)
    )


def _settings(plan: PairedPlan, *, cached: bool) -> dict[str, dict[str, object]]:
    encoder = {"device": "cpu", "torch_threads": plan.threads, "redis": cached}
    return {
        "diffusion": {"replicas": 0},
        "encoder": encoder,
        **{k: dict(v) for k, v in (ON if cached else OFF).items()},
    }


async def _capacity(plan: PairedPlan, url: str, tell: Tell) -> float:
    """Requests a second of the same kind of traffic, always `FULL` under way."""
    tell("the capacity without a cache")
    texts = requests(plan, [0.0] * _ENOUGH, "capacity")
    samples = await drive(url, texts, users=FULL, give_up_s=_GIVE_UP_S, until_s=plan.seconds)
    done = sorted(one.ended_s for one in samples if one.outcome is Outcome.DONE)
    try:
        # The first are fewer than fill it, and after the last was sent it is not full any more.
        return steady_rate([time for time in done[FULL - 1 :] if time <= plan.seconds])
    except ValueError:
        raise OperatorError(
            f"--seconds: the server without a cache has answered {len(done)} requests in {plan.seconds:g} s, too few "
            "to tell its capacity",
            "seconds",
        ) from None


async def _round(plan: PairedPlan, rate: float, number: int, cached: str, plain: str, tell: Tell) -> Round:
    """Who is asked first changes from round to round."""
    arrivals = requests(plan, poisson_arrivals(rate, plan.seconds, plan.seed + number), f"round {number}")
    sides = {}
    for url in (cached, plain) if number % 2 == 0 else (plain, cached):
        tell(f"round {number + 1} of {plan.rounds}, {'with' if url == cached else 'without'} the cache")
        sides[url] = side(await drive(url, arrivals, give_up_s=_GIVE_UP_S))
    texts = len({arrival.body["prompt"] for arrival in arrivals})
    return Round(requests=len(arrivals), texts=texts, cached=sides[cached], plain=sides[plain])


def side(samples: Sequence[Sample]) -> Side:
    done = [one for one in samples if one.outcome is Outcome.DONE]
    units = sum(sum(_cache(one).values()) for one in done)
    encoded = sum(_cache(one).get(Tier.ENCODED, 0) for one in done)
    hits = [one.latency_s for one in done if _cache(one) and not _cache(one).get(Tier.ENCODED)]
    bad = [one for one in samples if one.outcome is not Outcome.DONE]
    return Side(
        seconds=Tail.of(samples),
        hit_seconds=Percentiles.of(hits) if hits else None,
        hits=1 - encoded / units if units else None,
        failed=dict(Counter(f"{one.outcome}: {one.detail or one.status}" for one in bad).most_common()),
    )


def _cache(sample: Sample) -> Mapping[str, int]:
    """Units by tier, of one answer."""
    found: Mapping[str, int] = (sample.job or {}).get("cache") or {}
    return found


def requests(plan: PairedPlan, dues: Sequence[float], what: str) -> tuple[Arrival, ...]:
    """Prompts without a negative one, which such models don't read. T5's rows have FLUX's default length."""
    seed = random.Random(f"{plan.seed}/{what}").getrandbits(32)
    wording = Wording(Prompts(positive=Zipf(a=A, texts=TEXTS), empty_negative=1.0), seed)
    return tuple(
        Arrival(index=index, due_s=due_s, dialect="embeddings", body={"prompt": wording.next()[0]})
        for index, due_s in enumerate(dues)
    )
