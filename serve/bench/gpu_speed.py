"""How fast a model with random weights steps and draws on a card: by batch, compiled, through the engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from serve.bench.gpu_memory import capped
from serve.bench.random_models import STEPS, draw, latents_of, random_family, random_work
from serve.diffusion.engine import Engine
from serve.diffusion.profile import Profile
from serve.diffusion.runner import Runner
from serve.diffusion.scheduler import StepScheduler
from serve.errors import OutOfMemory
from serve.memory.terms import Dtype, ModelShape
from serve.rungs import Rung
from serve.telemetry.metrics import InProcessMetrics

LANES = (1, 2, 4, 8, 16, 32)
RUNS = 3
WORTH_S = 10.0
"""No larger batch is tried than one whose step takes so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpeed:
    """A step of so many lanes takes `seconds`, the median of several; `compiled_s` is that of the compiled denoiser,
    and `compiling_s` what its first step waited. None where that was not measured."""

    model: str
    dtype: str
    width: int
    height: int
    lanes: int
    seconds: float
    compiled_s: float | None = None
    compiling_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """`images` of `steps` steps each, `batch` of them stepping together while others are decoded."""

    model: str
    dtype: str
    width: int
    height: int
    steps: int
    batch: int
    images: int
    seconds: float

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds


def measure_steps(
    shape: ModelShape, dtype: Dtype, size: tuple[int, int], device: torch.device, lanes: Sequence[int] = LANES
) -> tuple[StepSpeed, ...]:
    """By batch, up to what the memory holds."""
    with capped(device, None):
        runner = Runner(random_family(shape, device, getattr(torch, dtype), Rung.RESIDENT))
        times: list[StepSpeed] = []
        for each in lanes:
            if times and times[-1].seconds > WORTH_S:
                break
            try:
                seconds = step_s(runner, shape, size, each)
            except OutOfMemory:
                break
            times.append(_speed(shape, dtype, size, each, seconds))
        return tuple(times)


def measure_compiled(
    shape: ModelShape, dtype: Dtype, size: tuple[int, int], device: torch.device, lanes: Sequence[int]
) -> tuple[StepSpeed, ...]:
    """The same steps as the denoiser is written, and compiled. Raises OperatorError where there is no compiler."""
    with capped(device, None):
        kind = getattr(torch, dtype)
        runner = Runner(random_family(shape, device, kind, Rung.RESIDENT))
        plain = {each: step_s(runner, shape, size, each) for each in lanes}
        del runner
    with capped(device, None):
        runner = Runner(random_family(shape, device, kind, Rung.RESIDENT, compiled=True))
        times = []
        for each in lanes:
            first_s = runner.measure(latents_of(shape, size), each)
            found = step_s(runner, shape, size, each)
            times.append(_speed(shape, dtype, size, each, plain[each], compiled_s=found, compiling_s=first_s))
        return tuple(times)


def measure_drawn(
    shape: ModelShape,
    dtype: Dtype,
    size: tuple[int, int],
    device: torch.device,
    batch: int,
    images: int,
    steps: int = STEPS,
) -> Drawn:
    """Through the engine, as a replica with a full queue draws. Raises OutOfMemory, GenerationFailed."""
    with capped(device, None):
        runner = Runner(random_family(shape, device, getattr(torch, dtype), Rung.RESIDENT))
        profile = Profile(batch)
        engine = Engine(runner, StepScheduler(profile), profile, InProcessMetrics())
        try:
            draw(engine, [random_work(runner, shape, size, seed, 2) for seed in range(batch)])  # warms up
            works = [random_work(runner, shape, size, seed, steps) for seed in range(images)]
            began = time.perf_counter()
            draw(engine, works)
            seconds = time.perf_counter() - began
        finally:
            engine.stop()
    return Drawn(
        model=shape.name,
        dtype=dtype,
        width=size[0],
        height=size[1],
        steps=steps,
        batch=batch,
        images=images,
        seconds=seconds,
    )


def step_s(runner: Runner, shape: ModelShape, size: tuple[int, int], lanes: int) -> float:
    """Seconds of a step, the median of several after one that warms up. Raises OutOfMemory."""
    latents = latents_of(shape, size)
    runner.measure(latents, lanes)
    return median(runner.measure(latents, lanes) for _ in range(RUNS))


def _speed(
    shape: ModelShape, dtype: Dtype, size: tuple[int, int], lanes: int, seconds: float, **compiled: float
) -> StepSpeed:
    return StepSpeed(
        model=shape.name, dtype=dtype, width=size[0], height=size[1], lanes=lanes, seconds=seconds, **compiled
    )
