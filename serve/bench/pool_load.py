"""One encoder pool in this process: its capacity, an answer that has to be computed, and latency under load."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from serve.bench.load import Latency, Send, latency, open_loop, saturate
from serve.bench.shapes import EncoderShape
from serve.bench.stats import Percentiles, poisson_arrivals
from serve.bench.texts import random_row
from serve.domain.text import EncodeUnit
from serve.encoders.forward import TextTower
from serve.encoders.pool import EncoderPool
from serve.encoders.registry import Encoder
from serve.settings.stores import CacheSettings
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics

LOADS = (0.5, 0.9)
_MISSES = (5, 200)
_RUN = 1_000_000
"""Numbers of texts that one run may use; the next run begins after them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLatency:
    """`miss` is a request to an idle pool for a text that is nowhere cached; `capacity` in requests a second."""

    encoder: str
    miss: Percentiles
    capacity: float
    loads: tuple[Latency, ...]


async def measure_pool(
    tower: TextTower, encoder: Encoder, shape: EncoderShape, *, concurrency: int, seconds: float, seed: int
) -> PoolLatency:
    """Requests of one unit each, all of different texts. `concurrency` requests fill the pool."""
    settings = Settings(cache=CacheSettings(redis_url=None))
    pool = EncoderPool(tower, encoder, settings, InProcessMetrics())

    def run(number: int) -> Send:
        async def send(index: int) -> None:
            row = random_row(shape, seed, number * _RUN + index)
            await pool.encode([EncodeUnit(encoder.fingerprint, row, output) for output in encoder.outputs])

        return send

    try:
        miss = await _misses(run(1), seconds / 4)
        capacity = await saturate(run(2), concurrency, seconds / 2)
        loads = await under_load(shape.name, run, capacity, seconds, seed)
    finally:
        await pool.close()
    return PoolLatency(encoder=shape.name, miss=miss, capacity=capacity, loads=loads)


async def under_load(
    what: str, run: Callable[[int], Send], capacity: float, seconds: float, seed: int
) -> tuple[Latency, ...]:
    """Open loop at each of `LOADS`. `run(n)` sends run n's requests, which no other run sends."""
    loads = []
    for number, load in enumerate(LOADS, 10):
        rate = load * capacity
        samples = await open_loop(run(number), poisson_arrivals(rate, seconds, seed + number))
        loads.append(latency(what, load, rate, samples))
    return tuple(loads)


async def _misses(send: Send, seconds: float) -> Percentiles:
    """One after another, the first not counted."""
    least, most = _MISSES
    taken: list[float] = []
    await send(0)
    while len(taken) < least or (len(taken) < most and sum(taken) < seconds):
        began = time.perf_counter()
        await send(len(taken) + 1)
        taken.append(time.perf_counter() - began)
    return Percentiles.of(taken)
