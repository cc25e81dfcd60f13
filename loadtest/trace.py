"""A workload and a seed -> every request of a run: when it is due, what it asks for, in which words."""

from __future__ import annotations

import json
import math
import random
import ssl
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import numpy as np

from loadtest.prompts import Wording
from loadtest.samples import Arrival
from loadtest.workload import Burst, Closed, Diurnal, Workload
from serve.bench.mixed import Offer, draw
from serve.bench.stats import poisson_arrivals
from serve.cli.client import bearer
from serve.errors import OperatorError
from serve.models import ModelFolder

Catalog = Mapping[str, Offer]
"""What a target draws with, by the model's name; the first is the one that orders without a name get."""


def catalog_of(model: ModelFolder) -> Catalog:
    """Of a folder, where there is no server to ask."""
    offer = Offer.of(model)
    return {offer.model: offer}


async def fetch_catalog(target: str, key: str | None = None) -> Catalog:
    """From `GET /v1/models` of a Tandem server. Raises OperatorError."""
    try:
        verify = ssl.create_default_context()  # as the load itself will see it
        async with httpx.AsyncClient(
            base_url=target, headers=bearer(key), timeout=30.0, trust_env=False, verify=verify
        ) as http:
            answer = await http.get("/v1/models")
    except (httpx.TransportError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise OperatorError(f"--target: no server answers at {target} ({error})", "target") from None
    return read_catalog(target, answer.status_code, answer.content)


def read_catalog(target: str, status: int, content: bytes) -> Catalog:
    """What `GET /v1/models` answered. Raises OperatorError."""
    try:
        if status in (401, 403):
            raise OperatorError(f"--key: {target} wants another API key (GET /v1/models: {status})", "key")
        data = json.loads(content)["data"]
        offers = [
            Offer(
                model=model["id"],
                sizes={ratio: (width, height) for ratio, (width, height) in model["aspect_ratios"].items()},
                samplers=model["schedulers"],
                guidance=model["guidance"],
                default_guidance_scale=model["default_guidance_scale"],
            )
            for model in data
            if model["images"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OperatorError(f"--target: {target} is no Tandem server (GET /v1/models: {status})", "target") from None
    if not offers:
        raise OperatorError(f"--target: {target} draws with no model", "target")
    return {offer.model: offer for offer in offers}


def trace(workload: Workload, seed: int, catalog: Catalog) -> tuple[Arrival, ...]:
    """The same for a seed. Raises OperatorError for a `load` whose capacity is not known yet, and for a model, ratio or
    sampler that the target has not."""
    offer = _offer(workload, catalog)
    dues = due_times(workload, seed)
    wording = Wording(workload.prompts, seed)
    images, ways, leaving = (random.Random(f"{part}/{seed}") for part in ("images", "dialects", "hang-ups"))
    dialects, weights = list(workload.dialects), list(workload.dialects.values())
    arrivals = []
    for index, due_s in enumerate(dues):
        body = _body(workload, offer, images, wording) | {"seed": (seed * 1_000_003 + index) % 2**32}
        arrivals.append(
            Arrival(
                index=index,
                due_s=due_s,
                dialect=ways.choices(dialects, weights)[0],
                body=body,
                hang_up_s=_hang_up(workload, leaving),
            )
        )
    return tuple(arrivals)


def due_times(workload: Workload, seed: int) -> Sequence[float]:
    """Seconds after the start, ascending; how many is fixed by the rate and the duration, at least one."""
    arrivals, seconds = workload.arrivals, workload.duration_s
    if isinstance(arrivals, Closed):
        return [0.0] * arrivals.orders
    if arrivals.rate is None:
        raise OperatorError(f"{workload.name}: its rate is {arrivals.load:g} times a capacity: name one", "capacity")
    number = random.Random(f"arrivals/{seed}").getrandbits(63)
    if isinstance(arrivals, Burst):
        return _bursts(arrivals, arrivals.rate, seconds, number)
    if isinstance(arrivals, Diurnal):
        return _day(arrivals, arrivals.rate, seconds, number)
    return poisson_arrivals(arrivals.rate, seconds, number)


def _bursts(burst: Burst, rate: float, seconds: float, seed: int) -> list[float]:
    """A Poisson process on a clock that stands still between bursts; as many requests as without them."""
    whole, rest = divmod(seconds, burst.on_s + burst.off_s)
    on = whole * burst.on_s + min(rest, burst.on_s)
    times = poisson_arrivals(rate * seconds / on, on, seed)
    return [time + math.floor(time / burst.on_s) * burst.off_s for time in times]


def _day(day: Diurnal, rate: float, seconds: float, seed: int) -> list[float]:
    """By thinning (Lewis and Shedler 1979), of a fixed number as in `poisson_arrivals`."""
    rng = np.random.default_rng(seed)
    times: list[float] = []
    while len(times) < max(1, round(rate * seconds)):
        time = rng.uniform(0.0, seconds)
        if rng.uniform(0.0, 1 + day.swing) < 1 - day.swing * math.cos(2 * math.pi * time / seconds):
            times.append(float(time))
    return sorted(times)


def _offer(workload: Workload, catalog: Catalog) -> Offer:
    name = workload.images.model or next(iter(catalog))
    if name not in catalog:
        raise OperatorError(f"{workload.name}: images.model: {name} is not one of {', '.join(catalog)}", "model")
    return catalog[name]


def _body(workload: Workload, offer: Offer, rng: random.Random, wording: Wording) -> dict[str, Any]:
    try:
        drawn = draw(workload.images.mix(), offer, rng)
    except ValueError as error:
        raise OperatorError(f"{workload.name}: images: {error}", "workload") from None
    prompt, negative = wording.next()
    return {
        "prompt": prompt,
        "negative_prompt": negative,
        "num_inference_steps": drawn.num_inference_steps,
        "guidance_scale": drawn.guidance_scale,
        "width": drawn.width,
        "height": drawn.height,
        "scheduler": drawn.scheduler,
    } | ({"model": workload.images.model} if workload.images.model else {})


def _hang_up(workload: Workload, rng: random.Random) -> float | None:
    plan = workload.hang_ups
    if plan is None:
        return None
    leaves, after_s = rng.random() < plan.share, rng.uniform(*plan.after_s)
    return after_s if leaves else None
