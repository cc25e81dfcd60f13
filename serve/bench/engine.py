"""`tandem bench engine`: the step loop against the stock pipeline, in one process, on the same cores."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from serve.bench.approximate import PROMPTS as CACHED
from serve.bench.approximate import Saving, measure_savings
from serve.bench.conditionings import encode_orders
from serve.bench.engine_load import (
    Drawers,
    OpenLoop,
    Saturated,
    ShortBehindLong,
    measure_open_loop,
    measure_saturated,
    measure_short_behind_long,
)
from serve.bench.machine import Machine, OtherWork, this_machine
from serve.bench.mixed import mixed_orders
from serve.bench.steps import StepTable, measure_steps
from serve.bench.stock import StockPipeline
from serve.bench.texts import prompt
from serve.diffusion.engine import Engine
from serve.diffusion.profile import Profile, open_profile
from serve.diffusion.runner import Runner, open_runner
from serve.diffusion.scheduler import StepScheduler
from serve.domain.orders import ImageRequest
from serve.models import ModelFolder, resolve
from serve.models.presets import presets
from serve.settings.pools import DiffusionSettings, ModelSettings
from serve.shapes.captions import held_out_prompts
from serve.telemetry.metrics import InProcessMetrics

Section = Literal["steps", "saturated", "open-loop", "short", "step-cache"]
SECTIONS: tuple[Section, ...] = get_args(Section)
PROMPTS = 16
SHAPES = ("1:1", "3:2", "16:9")
"""Aspect presets whose steps are timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`orders` is how many images of mixed work one pass of the saturated section draws with each side; it takes
    `rounds` turns. `seconds` is the length of the open loop, and bounds a step that is still measured (a tenth)."""

    source: str
    diffusion: DiffusionSettings
    sections: frozenset[Section]
    orders: int
    rounds: int
    seconds: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that was measured; None is a section that was not asked for. `caps` are the most images of a batch
    that the profile found to pay, by size (width, height)."""

    machine: Machine
    model: str
    family: str
    device: str
    dtype: str
    seed: int
    caps: dict[tuple[int, int], int]
    other_work: float | None = None
    steps: list[StepTable] = field(default_factory=list)
    saturated: Saturated | None = None
    open_loop: OpenLoop | None = None
    short: ShortBehindLong | None = None
    savings: list[Saving] = field(default_factory=list)


def measure(plan: Plan, tell: Callable[[str], None]) -> Report:
    """Measure all of the plan; `tell` hears what comes next. Raises OperatorError for a model that can't be served."""
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as scratch:
        data_dir = Path(scratch)
        tell("loading the model")
        model = resolve(ModelSettings(source=plan.source), data_dir)
        prompts = [text for text, _ in held_out_prompts(PROMPTS)] if model.name == "shapes" else _prompts(plan.seed)
        orders = mixed_orders(model, prompts, plan.orders, plan.seed)
        texts = encode_orders(model, orders, data_dir)
        runner = open_runner(model, plan.diffusion)
        tell("finding the batch that pays")
        profile = open_profile(runner, model, plan.diffusion, data_dir)
        with OtherWork() as others:
            report = _describe(plan, model, runner, profile)
            if "steps" in plan.sections:
                tell("steps by size and batch")
                report.steps.extend(_steps(plan, model, runner))
            if "step-cache" in plan.sections:
                tell("step cache")
                report.savings.extend(measure_savings(runner, orders[:CACHED], texts))
            if plan.sections & {"saturated", "open-loop", "short"}:
                stock = StockPipeline(model, runner.family.device, runner.family.dtype)
                with _engine(runner, profile) as engine:
                    report = asyncio.run(
                        _loads(plan, report, Drawers(stock, engine, texts, plan.diffusion.max_rows), orders, tell)
                    )
                stock.close()
    return replace(report, other_work=others.share)


async def _loads(
    plan: Plan, report: Report, drawers: Drawers, orders: list[ImageRequest], tell: Callable[[str], None]
) -> Report:
    for order in orders[:2]:  # both sides are warm before anything counts
        await drawers.stock(order)
        await drawers.engine(order)
    if "short" in plan.sections:
        tell("a short job behind long ones")
        report = replace(report, short=await measure_short_behind_long(drawers, orders[0]))
    if plan.sections & {"saturated", "open-loop"}:
        tell("saturated")
        saturated, capacity = await measure_saturated(drawers, orders, plan.rounds)
        report = replace(report, saturated=saturated)
        if "open-loop" in plan.sections:
            tell("open loop")
            loop = await measure_open_loop(drawers, orders, capacity, plan.seconds, plan.seed)
            report = replace(report, open_loop=loop)
    return report


@contextmanager
def _engine(runner: Runner, profile: Profile) -> Iterator[Engine]:
    engine = Engine(runner, StepScheduler(profile), profile, InProcessMetrics())
    try:
        yield engine
    finally:
        engine.stop()


def _steps(plan: Plan, model: ModelFolder, runner: Runner) -> Iterator[StepTable]:
    assert model.denoiser is not None
    sizes = presets(model.denoiser, model.family)
    for width, height in dict.fromkeys(sizes[ratio] for ratio in SHAPES):
        yield measure_steps(runner, model.denoiser, width, height, plan.seconds / 10)


def _describe(plan: Plan, model: ModelFolder, runner: Runner, profile: Profile) -> Report:
    assert model.denoiser is not None
    factor, family = model.denoiser.vae_scale_factor, runner.family
    lanes = 2 if model.denoiser.guidance == "classifier_free" else 1
    sizes = presets(model.denoiser, model.family)
    return Report(
        machine=this_machine(),
        model=model.name,
        family=model.family,
        device=family.device.type,
        dtype=str(family.dtype).removeprefix("torch."),
        seed=plan.seed,
        caps={
            (width, height): profile.lanes((height // factor, width // factor)) // lanes
            for width, height in (sizes[ratio] for ratio in SHAPES)
        },
    )


def _prompts(seed: int) -> list[str]:
    return [prompt(seed, index) for index in range(PROMPTS)]
