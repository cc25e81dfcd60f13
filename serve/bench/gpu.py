"""`tandem bench gpu`: what a card makes of the published models, with random weights, in one process."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch

from serve.bench.gpu_encoders import measure_encoder
from serve.bench.gpu_memory import Held, measure_held
from serve.bench.gpu_speed import LANES, Drawn, StepSpeed, measure_compiled, measure_drawn, measure_steps
from serve.bench.machine import Machine, this_machine
from serve.bench.random_models import STEPS, size_of
from serve.bench.shapes import EncoderShape
from serve.bench.throughput import Throughput
from serve.bench.windows import Budget
from serve.devices import CLASS_SLACK, Card, out_of_memory
from serve.errors import DeviceLost, OutOfMemory, TandemError
from serve.memory.classes import BUILT_IN
from serve.memory.planner import plan as planned
from serve.memory.terms import Dtype, ModelShape
from serve.models.denoiser import best_dtype
from serve.rungs import LADDER, MEANS, Rung

log = logging.getLogger(__name__)

Section = Literal["memory", "rungs", "steps", "images", "compile", "encoders"]
SECTIONS: tuple[Section, ...] = get_args(Section)
Case = tuple[str, str, int]
"""Model, class, side in pixels."""
CASES: tuple[Case, ...] = (
    ("sd15", "4gb", 512),
    ("sdxl", "11gb", 1024),
    ("sdxl", "11gb", 1536),
    ("sd35-medium", "11gb", 1024),
    ("sd35-large", "11gb", 1024),
    ("flux-dev", "11gb", 1024),
)
"""What the classes are meant for, each in the memory that its class gives it."""
LADDERS: tuple[Case, ...] = (("sd15", "4gb", 512), ("sdxl", "11gb", 1024))
"""Those that are measured on every rung."""
TIMED: tuple[str, ...] = ("sd15", "sdxl", "sd35-medium")
"""Models whose steps are timed."""
ENCODER_BUDGET = Budget(windows=3, window_s=0.5, longest_s=2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sections for these models, which `shapes` has. `images` are drawn, `batch` of them in a step; encoders are timed
    within `encoder_budget`, the card's products for `look_s`. Of `cases` the memory is measured, of `ladders` that of
    each of `rungs`."""

    device: torch.device
    card: Card
    shapes: Mapping[str, ModelShape]
    sections: frozenset[Section]
    encoders: Mapping[str, EncoderShape]
    lanes: tuple[int, ...] = LANES
    compiled_lanes: tuple[int, ...] = (2, 8)
    batch: int = 8
    images: int = 24
    steps: int = STEPS
    encoder_budget: Budget = ENCODER_BUDGET
    look_s: float = 1.0
    cases: tuple[Case, ...] = CASES
    ladders: tuple[Case, ...] = LADDERS
    rungs: tuple[Rung, ...] = tuple(rung for rung in LADDER if MEANS[rung].on_card)

    def dtype(self, shape: ModelShape) -> Dtype:
        """The one that the model was trained in, where the card has it."""
        name = best_dtype(shape.family, self.card.dtypes)
        return next(each for each in self.card.dtypes if each == name)

    @property
    def timed(self) -> tuple[ModelShape, ...]:
        """Of the models, those whose steps are timed: the usual ones, or all where none of them is there."""
        usual = [shape for name, shape in self.shapes.items() if name in TIMED]
        return tuple(usual or self.shapes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`left_out` says what was not measured, and why; `lost`, that the card failed, so that nothing more could be."""

    machine: Machine
    card: Card
    memory: tuple[Held, ...] = ()
    rungs: tuple[Held, ...] = ()
    steps: tuple[StepSpeed, ...] = ()
    images: tuple[Drawn, ...] = ()
    compile: tuple[StepSpeed, ...] = ()
    encoders: tuple[Throughput, ...] = ()
    left_out: tuple[str, ...] = ()
    lost: bool = False

    def holds(self, sections: Container[Section]) -> bool:
        """Whether the card was there to the end, and what was asked for of memory was measured and fits."""
        measured = bool(self.memory) or "memory" not in sections
        return measured and not self.lost and all(one.fits for one in self.memory)


@dataclass(frozen=True, slots=True)
class Job:
    """One model in one section. `run` gives its figures."""

    section: Section
    what: str
    run: Callable[[], Sequence[Any]]


def measure(plan: Plan, tell: Callable[[str], None]) -> Report:
    """One job after another; of one that fails the report says so, and of a card that fails that it was the last."""
    found: dict[str, list[Any]] = defaultdict(list)
    left_out: list[str] = []
    lost = False
    for job in jobs(plan):
        tell(job.what)
        try:
            found[job.section] += job.run()
        except Exception as error:  # what was measured before may have taken an hour
            log.debug("%s", job.what, exc_info=error)
            left_out.append(f"{job.what}: {_reason(error)}")
            lost = isinstance(error, DeviceLost | torch.AcceleratorError) and not out_of_memory(error)
        if lost:
            break
    figures = {section: tuple(each) for section, each in found.items()}
    return Report(machine=this_machine(), card=plan.card, left_out=tuple(left_out), lost=lost, **figures)


def _reason(error: Exception) -> str:
    """In one line."""
    if isinstance(error, TandemError):
        return error.message
    if out_of_memory(error):
        return "memory ran out"
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def jobs(plan: Plan) -> Iterator[Job]:
    """Those of the plan's sections, in their order."""
    makers: Mapping[Section, Callable[[Plan], Iterator[Job]]] = {
        "memory": _memory,
        "rungs": _rungs,
        "steps": _steps,
        "images": _images,
        "compile": _compile,
        "encoders": _encoders,
    }
    for section in SECTIONS:
        if section in plan.sections:
            yield from makers[section](plan)


def _memory(plan: Plan) -> Iterator[Job]:
    for name, gpu_class, side in plan.cases:
        if shape := plan.shapes.get(name):
            yield Job(
                "memory", f"{name} at {side} x {side} in {gpu_class}", partial(_held, plan, shape, gpu_class, side)
            )


def _rungs(plan: Plan) -> Iterator[Job]:
    """Some of the better ones do not fit their class: that they are seen to fail is a figure too."""
    for name, gpu_class, side in plan.ladders:
        for rung in plan.rungs:
            if shape := plan.shapes.get(name):
                yield Job("rungs", f"{name} on {rung}", partial(_held, plan, shape, gpu_class, side, rung))


def _held(plan: Plan, shape: ModelShape, gpu_class: str, side: int, rung: Rung | None = None) -> list[Held]:
    gpu = BUILT_IN[gpu_class]
    if gpu.memory_bytes > plan.card.memory_bytes / CLASS_SLACK:
        raise OutOfMemory(f"the card has {plan.card.memory_bytes / 1e9:.1f} GB")
    best, worst = (LADDER[0], LADDER[-2]) if rung is None else (rung, rung)
    made = planned(shape, gpu.memory_bytes, gpu.dtypes, width=side, height=side, best=best, worst=worst)
    return [measure_held(shape, made, gpu_class, plan.device)]


def _steps(plan: Plan) -> Iterator[Job]:
    for shape in plan.timed:
        run = partial(measure_steps, shape, plan.dtype(shape), size_of(shape), plan.device, plan.lanes)
        yield Job("steps", f"steps of {shape.name}", run)


def _images(plan: Plan) -> Iterator[Job]:
    for shape in plan.timed:
        yield Job("images", f"images of {shape.name}", partial(_drawn, plan, shape))


def _drawn(plan: Plan, shape: ModelShape) -> list[Drawn]:
    size = size_of(shape)
    return [measure_drawn(shape, plan.dtype(shape), size, plan.device, plan.batch, plan.images, plan.steps)]


def _compile(plan: Plan) -> Iterator[Job]:
    for shape in plan.timed:
        size = size_of(shape)
        run = partial(measure_compiled, shape, plan.dtype(shape), size, plan.device, plan.compiled_lanes)
        yield Job("compile", f"steps of {shape.name}, compiled", run)


def _encoders(plan: Plan) -> Iterator[Job]:
    for shape in plan.encoders.values():
        yield Job("encoders", f"rows of {shape.name}", partial(_encoder, plan, shape))


def _encoder(plan: Plan, shape: EncoderShape) -> list[Throughput]:
    return [measure_encoder(shape, plan.card.dtypes[0], plan.device, plan.encoder_budget, plan.look_s)]
