"""What `tandem plan` computes: a row for each model and kind of card."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serve.errors import OperatorError
from serve.memory.classes import GpuClass
from serve.memory.planner import MOST_SIDE, USABLE, Plan, plan
from serve.memory.speed import Speed, predicted
from serve.memory.terms import Dtype, ModelShape
from serve.placements import held_size
from serve.rungs import LADDER, MEANS, Rung

GB = 1e9
CONTEXT_BYTES = 0.4e9
"""What each process takes of a card beside what torch's allocator counts: CUDA's context, its libraries' kernels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is planned for. Each model's own size, steps and precision where None; the rungs from `best` to `worst`."""

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    dtype: Dtype | None = None
    best: Rung = Rung.RESIDENT
    worst: Rung = Rung.SEQUENTIAL_OFFLOAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A kind of card; `number` of them are here, where they were looked for."""

    gpu: GpuClass
    number: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """`steps` are those of an order that names none."""

    shape: ModelShape
    steps: int


class Fit(enum.Enum):
    """`WHOLE`: all weights lie on the card as they are. `SQUEEZED`: they are packed, or come and go. `NONE`: the card
    does not draw that size."""

    WHOLE = enum.auto()
    SQUEEZED = enum.auto()
    NONE = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`share` is the part of the card's memory that one replica needs, as `num_gpus` says it; `replicas` as many have
    room on one card. Both are 0 where the model does not fit. `speed` is None there, and where the card's figures are
    not known. `passed` are the better rungs, with the peak in bytes that each of them would have."""

    model: Model
    card: Card
    plan: Plan
    share: float
    replicas: int
    speed: Speed | None
    passed: tuple[tuple[Rung, int], ...]

    @property
    def fit(self) -> Fit:
        means = MEANS[self.plan.rung]
        if not self.plan.fits:
            return Fit.NONE
        return Fit.WHOLE if means.weights == "plain" and means.offload == "none" else Fit.SQUEEZED

    @property
    def decode(self) -> Literal["whole", "tiled"]:
        return "whole" if self.plan.width * self.plan.height <= self.plan.tile**2 else "tiled"

    @property
    def max_size(self) -> tuple[int, int]:
        """The largest image in the proportions of the one that was planned."""
        return held_size(self.plan.width, self.plan.height, self.plan.max_pixels) if self.plan.max_pixels else (0, 0)


Grid = Sequence[Sequence[Row]]
"""A row for each model, in it a cell for each card."""


def grid(models: Sequence[Model], cards: Sequence[Card], asked: Asked) -> Grid:
    """Raises OperatorError naming `size`, where it is not on the grid of a model."""
    for model in models:
        _check_size(model.shape, asked)
    return [[_row(model, card, asked) for card in cards] for model in models]


def as_json(row: Row) -> dict[str, Any]:
    """One entry of `--json`. GB are 10^9 bytes; what is not known is null."""
    plan, gpu, held = row.plan, row.card.gpu, row.plan.footprint
    return {
        "model": row.model.shape.name,
        "gpu_class": gpu.name,
        "memory_gb": round(gpu.memory_gb, 3),
        "cards": row.card.number,
        "like": gpu.like or None,
        "fits": plan.fits,
        "rung": plan.rung.value,
        "dtype": plan.dtype,
        "width": plan.width,
        "height": plan.height,
        "decode": row.decode,
        "tile": plan.tile,
        "peak_gb": _gb(held.peak),
        "usable_gb": _gb(plan.budget),
        "phases": {
            "weights_gb": _gb(held.weights),
            "step_gb": _gb(held.step),
            "decode_gb": _gb(held.decode),
            "encode_gb": _gb(held.encode),
        },
        "beside": held.beside,
        "share": row.share,
        "replicas": row.replicas,
        "max_pixels": plan.max_pixels,
        "max_size": list(row.max_size),
        "lanes": plan.lanes,
        "images": plan.lanes // row.model.shape.lanes,
    } | _timed(row)


def _timed(row: Row) -> dict[str, Any]:
    if row.speed is None:
        return {"seconds": None, "arithmetic": []}
    terms = [{"term": each.name, "seconds": round(each.seconds, 4), "how": each.how} for each in row.speed.terms]
    return {"seconds": round(row.speed.seconds, 3), "arithmetic": terms}


def _gb(size: int) -> float:
    return round(size / GB, 3)


def _check_size(shape: ModelShape, asked: Asked) -> None:
    grid = shape.size_multiple
    for side in (asked.width, asked.height):
        if side is not None and (side < grid or side % grid):
            raise OperatorError(f"--size: {side} is not a multiple of {grid}, as {shape.name} needs", "size")
        if side is not None and side > MOST_SIDE:
            raise OperatorError(f"--size: {MOST_SIDE} pixels a side are the most", "size")


def _row(model: Model, card: Card, asked: Asked) -> Row:
    shape, gpu = model.shape, card.gpu
    found = _plan(shape, gpu, asked, asked.best, asked.worst)
    better = LADDER[LADDER.index(asked.best) : LADDER.index(found.rung)]
    share = _share(found.footprint.peak, gpu.memory_bytes) if found.fits else 0.0
    return Row(
        model=model,
        card=card,
        plan=found,
        share=share,
        replicas=math.floor(1 / share) if share else 0,
        speed=predicted(shape, gpu, found, asked.steps or model.steps) if found.fits else None,
        passed=tuple((rung, _plan(shape, gpu, asked, rung, rung).footprint.peak) for rung in better),
    )


def _plan(shape: ModelShape, gpu: GpuClass, asked: Asked, best: Rung, worst: Rung) -> Plan:
    return plan(
        shape,
        gpu.memory_bytes,
        gpu.dtypes,
        width=asked.width,
        height=asked.height,
        dtype=asked.dtype,
        best=best,
        worst=worst,
    )


def _share(peak: int, memory_bytes: float) -> float:
    """Rounded up to hundredths. A replica that fits a whole card never needs more than that card."""
    needed = max(peak / USABLE, peak + CONTEXT_BYTES) / memory_bytes
    return min(math.ceil(100 * needed) / 100, 1.0)
