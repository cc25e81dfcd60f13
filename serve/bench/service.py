"""The whole service over HTTP: latency of `POST /v1/embeddings`, and what happens when its Redis goes away."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from serve.bench.load import GIVE_UP_S, Latency, Sample, Send, latency, open_loop, saturate
from serve.bench.pool_load import LOADS, under_load
from serve.bench.stats import Percentiles, poisson_arrivals
from serve.bench.texts import prompt
from serve.embedded import EmbeddedRedis

Serve = Callable[[Path, Mapping[str, Mapping[str, object]]], AbstractAsyncContextManager[str]]
"""Starts a server of a model folder with these groups of settings, gives its address when it is ready, and ends it."""

Loss = Literal["killed", "hung"]
HOT = 32
"""Different texts among the repeated ones."""
REPEATED = 0.5
_MENDED_S = 60.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLatency:
    """`encoder` names all of the model's, which every request needs. `capacity` is in requests a second, of texts that
    are nowhere cached."""

    encoder: str
    capacity: float
    loads: tuple[Latency, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisLoss:
    """Half of the texts are repeated, Redis is lost in the middle: `killed`, or `hung` (it keeps its connections and
    answers nothing). `bound` is what the answers afterwards may take: the timeout plus the P99 without any cache.
    `hits` of `requests` were in Redis while it was there."""

    loss: Loss
    rate: float
    requests: int
    hits: int
    failed: Mapping[str, int]
    before: Percentiles | None
    after: Percentiles | None
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePlan:
    """What is measured and for how long. `concurrency` requests at once fill the server; `timeout_s` is the one that
    its cache has for Redis."""

    encoder: str
    concurrency: int
    seconds: float
    seed: int
    timeout_s: float


Encode = Callable[[str], Awaitable[Mapping[str, int]]]
"""Has a prompt encoded; units by the tier that they came from."""


class Caller:
    """Posts prompts. Owns: the HTTP connections; use it as an async context manager."""

    def __init__(self, url: str, max_sequence_length: int | None = None) -> None:
        """`max_sequence_length` is that of a T5's rows, None for a model without one."""
        self._options = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(base_url=url, timeout=GIVE_UP_S, limits=limits, trust_env=False)

    async def __aenter__(self) -> Caller:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def encode(self, text: str) -> Mapping[str, int]:
        """An `Encode`. Raises httpx.HTTPError."""
        answer = await self._http.post("/v1/embeddings", json={"prompt": text, "output": "report", **self._options})
        answer.raise_for_status()
        cache: Mapping[str, int] = answer.json()["cache"]
        return cache


async def measure_service(encode: Encode, plan: ServicePlan) -> ServiceLatency:
    """Texts that are nowhere cached."""

    def run(number: int) -> Send:
        async def send(index: int) -> None:
            tiers = await encode(prompt(plan.seed * 100 + number, index))
            if not tiers["encoded"]:
                raise RuntimeError("a new text came from a cache")

        return send

    capacity = await saturate(run(1), plan.concurrency, plan.seconds / 2)
    loads = await under_load(plan.encoder, run, capacity, plan.seconds, plan.seed)
    return ServiceLatency(encoder=plan.encoder, capacity=capacity, loads=loads)


async def measure_loss(
    encode: Encode, redis: EmbeddedRedis, plan: ServicePlan, loss: Loss, latencies: ServiceLatency
) -> RedisLoss:
    """The server's memory holds nothing, so that every hit is Redis's. Redis is up before and after this."""
    uncached = latencies.loads[0].seconds
    if uncached is None:
        raise RuntimeError("no request was answered even with Redis")
    texts = _Texts(encode, f"{plan.seed} {loss}")
    await texts.warm()
    rate = latencies.loads[0].rate
    losing = asyncio.create_task(_lose(redis, loss, plan.seconds))
    try:
        samples = await open_loop(texts.send, poisson_arrivals(rate, 2 * plan.seconds, plan.seed))
    finally:
        losing.cancel()
        _bring_back(redis, loss)
    return RedisLoss(
        loss=loss,
        rate=rate,
        requests=len(samples),
        hits=texts.hits,
        failed=latency(loss, LOADS[0], rate, samples).failed,
        before=_answered(samples, plan.seconds, late=False),
        after=_answered(samples, plan.seconds, late=True),
        bound=plan.timeout_s + uncached.p99,
    )


class _Texts:
    """Half of the requests repeat one of a few texts; who asks for what is fixed by the seed. Counts hits in Redis."""

    def __init__(self, encode: Encode, seed: str) -> None:
        self._encode = encode
        self._seed = seed
        self.hits = 0

    async def warm(self) -> None:
        """Until every repeated text comes from Redis; after a loss the server needs a moment to trust it again."""
        for number in range(HOT):
            await self._encode(self._hot(number))
        deadline = time.monotonic() + _MENDED_S
        for number in range(HOT):
            while not (await self._encode(self._hot(number)))["redis"]:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the server does not use its Redis within {_MENDED_S:.0f} s")
                await asyncio.sleep(_POLL_S)

    async def send(self, index: int) -> None:
        rng = random.Random(f"{self._seed}/{index}")
        repeated = rng.random() < REPEATED
        text = self._hot(rng.randrange(HOT)) if repeated else f"{prompt(0, index)}, {self._seed}"
        tiers = await self._encode(text)
        self.hits += tiers["redis"]

    def _hot(self, number: int) -> str:
        return f"{prompt(0, number)}, {self._seed}, repeated"


async def _lose(redis: EmbeddedRedis, loss: Loss, after_s: float) -> None:
    await asyncio.sleep(after_s)
    if loss == "killed":
        await asyncio.to_thread(redis.kill)
    elif redis.pid is not None:
        os.kill(redis.pid, signal.SIGSTOP)


def _bring_back(redis: EmbeddedRedis, loss: Loss) -> None:
    if loss == "hung" and redis.pid is not None:
        os.kill(redis.pid, signal.SIGCONT)
    elif not redis.alive:
        redis.start()


def _answered(samples: Sequence[Sample], lost_at: float, *, late: bool) -> Percentiles | None:
    """Of the requests that were answered before the loss, or after it: also those that were under way when it came."""
    taken = [
        sample.seconds for sample in samples if sample.error is None and (sample.due + sample.seconds > lost_at) is late
    ]
    return Percentiles.of(taken) if taken else None
