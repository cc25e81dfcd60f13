"""Who orders what, and when: a trace, from a file or made of a loadtest's workload."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.domain.orders import ImageRequest
from serve.errors import OperatorError
from serve.memory.terms import ModelShape
from serve.models.samplers import SAMPLERS
from serve.simulate.fleet import told

LEAST_S, MOST_S = 300.0, 1800.0
"""A fleet must be large enough for the busiest time of about that length."""
LONGEST_S = 31 * 86_400.0
"""Of a trace: each simulated second has its sweep."""
MOST_ORDERS = 10_000_000
"""Of a trace: beyond it, memory is what is short."""
ENOUGH = 3000
"""Orders, of which the slowest 5 % tell P95."""


@dataclass(frozen=True, slots=True)
class Order:
    """`due_s` counts from the start of the trace."""

    due_s: float
    owner: str
    request: ImageRequest
    priority: str = "interactive"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Orders in rising order of time; the last may be due before the end."""

    name: str
    duration_s: float
    orders: Sequence[Order]


class Line(BaseModel):
    """A line of a trace: one order. What is not written is the model's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    due_s: float = Field(ge=0, le=LONGEST_S, allow_inf_nan=False)
    """Seconds after the start."""
    model: str | None = None
    """By default the first pool's."""
    owner: str = "a"
    """Whose order it is: owners take turns."""
    priority: Literal["interactive", "batch"] = "interactive"
    """As in an order."""
    width: int | None = Field(None, ge=16, le=8192)
    """Pixels."""
    height: int | None = Field(None, ge=16, le=8192)
    """Pixels."""
    steps: int = Field(30, ge=1, le=1000)
    """`num_inference_steps`."""
    guided: bool = True
    """Whether each step takes two entries of the batch, where the model has guidance."""
    images: int = Field(1, ge=1, le=64)
    """`num_images`."""
    scheduler: str | None = None
    """As in an order: some samplers make two passes a step."""


def read(file: Path, shapes: Sequence[ModelShape]) -> Traffic:
    """JSON Lines, in any order. `shapes` are the models that the fleet draws, the first one's first. Raises
    OperatorError naming the line."""
    try:
        written = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(f"{file}: {getattr(error, 'strerror', None) or error}", "trace") from None
    orders = []
    for number, text in enumerate(written, 1):
        if not text.strip():
            continue
        try:
            line = Line.model_validate(json.loads(text))
            orders.append(order_of(line, shapes, number))
        except ValidationError as error:
            raise OperatorError(f"{file}: line {number}: {told(error)}", "trace") from None
        except (ValueError, OperatorError) as error:
            raise OperatorError(f"{file}: line {number}: {error}", "trace") from None
    if not orders:
        raise OperatorError(f"{file}: there is no order in it", "trace")
    orders.sort(key=lambda order: order.due_s)
    return Traffic(file.stem, max(orders[-1].due_s, 1.0), orders)


def order_of(line: Line, shapes: Sequence[ModelShape], number: int) -> Order:
    """Raises OperatorError for what the fleet does not draw: its model, its size, its sampler."""
    shape = next((each for each in shapes if line.model in (None, each.name)), None)
    if shape is None:
        raise OperatorError(f"model: no pool draws {line.model}", "trace")
    for side in ("width", "height"):
        if (getattr(line, side) or 0) % shape.size_multiple:
            raise OperatorError(f"{side}: {shape.name} draws multiples of {shape.size_multiple} pixels", "trace")
    if line.scheduler is not None and line.scheduler not in SAMPLERS:
        raise OperatorError(f"scheduler: there is no {line.scheduler}", "trace")
    request = ImageRequest(
        model=shape.name,
        prompt="",
        width=line.width or shape.default_width,
        height=line.height or shape.default_height,
        num_inference_steps=line.steps,
        guidance_scale=7.0 if shape.guided and line.guided else 1.0,
        seed=number,
        num_images=line.images,
        scheduler=line.scheduler,
    )
    return Order(line.due_s, line.owner, request, line.priority)


def made(
    name: str,
    due_s: Iterable[float],
    duration_s: float,
    shapes: Sequence[ModelShape],
    *,
    steps: Sequence[int],
    sizes: Sequence[tuple[int, int]] = (),
    unguided: float = 0.0,
    tenants: int = 20,
    skew: float = 1.0,
    seed: int = 0,
) -> Traffic:
    """Orders at those times for the models by turns of equal chance, in one of the steps and sizes (each model's own
    without any), a share of them `unguided`. Tenant number k orders as often as 1 / k**skew."""
    rng = random.Random(f"simulate/{seed}")
    weights = [1 / (rank + 1) ** skew for rank in range(tenants)]
    owners = rng.choices([f"tenant-{rank + 1}" for rank in range(tenants)], weights, k=len(times := list(due_s)))
    orders = []
    for number, (due, owner) in enumerate(zip(times, owners, strict=True)):
        shape = rng.choice(shapes)
        width, height = rng.choice(sizes) if sizes else (None, None)
        guided = rng.random() >= unguided
        line = Line(
            due_s=due, model=shape.name, owner=owner, width=width, height=height, steps=rng.choice(steps), guided=guided
        )
        orders.append(order_of(line, shapes, number))
    return Traffic(name, duration_s, orders)


def thinned(traffic: Traffic, share: float, seed: int = 0) -> Traffic:
    """Each order stays with that chance: a Poisson process stays one, at a lower rate."""
    rng = random.Random(f"thinned/{seed}")
    return Traffic(traffic.name, traffic.duration_s, [each for each in traffic.orders if rng.random() < share])


def enough_s(duration_s: float, orders: int) -> float:
    """In which about ENOUGH orders come, where so many do."""
    return min(MOST_S, max(LEAST_S, ENOUGH * duration_s / orders))


def busiest(traffic: Traffic, window_s: float) -> Traffic:
    """The window with the most steps x pixels of images, of those that begin at a multiple of half of it."""
    if traffic.duration_s <= 1.5 * window_s:
        return traffic
    half = window_s / 2
    work = [0.0] * (int(traffic.duration_s / half) + 2)
    for each in traffic.orders:
        asked = each.request
        work[int(each.due_s / half)] += asked.num_images * asked.num_inference_steps * asked.lanes * asked.pixels
    start = max(range(len(work) - 1), key=lambda n: work[n] + work[n + 1]) * half
    within = [
        Order(each.due_s - start, each.owner, each.request, each.priority)
        for each in traffic.orders
        if start <= each.due_s < start + window_s
    ]
    return Traffic(traffic.name, window_s, within)
