"""What `step_cache` saves, and what it costs: against the exact image, and against simply asking for fewer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from serve.bench.engine_load import Texts
from serve.diffusion.run import Picture, Work
from serve.diffusion.runner import Runner
from serve.domain.orders import ImageRequest
from serve.models.samplers import sampler_names

THRESHOLDS = (0.05, 0.1, 0.2)
STEPS = (20, 50)
SAMPLERS = ("dpmpp_2m_karras", "euler_a", "flow_euler")
PROMPTS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """`saved` is the share of forward passes that were not made, `error` the mean absolute difference of a channel from
    the exact image, in 1/255; over several prompts. `threshold` None: half of the steps instead of a cache."""

    sampler: str
    steps: int
    threshold: float | None
    saved: float
    error: float


def measure_savings(runner: Runner, orders: Sequence[ImageRequest], texts: Texts) -> list[Saving]:
    """`orders` give prompts, sizes and guidance; samplers and steps are the table's."""
    assert runner.family.model.denoiser is not None
    known = sampler_names(runner.family.model.denoiser.process)
    found = []
    for sampler in (name for name in SAMPLERS if name in known):
        for steps in STEPS:
            works = [
                Work(f"{sampler}-{steps}-{number}", order, texts[known_order])
                for number, known_order in enumerate(orders)
                for order in [replace(known_order, scheduler=sampler, num_inference_steps=steps)]
            ]
            found += _savings(runner, sampler, steps, works)
    return found


def _savings(runner: Runner, sampler: str, steps: int, works: Sequence[Work]) -> list[Saving]:
    exact = [_draw(runner, work)[0] for work in works]

    def against(threshold: float | None, **changes: float | int) -> Saving:
        drawn = [_draw(runner, replace(work, request=replace(work.request, **changes))) for work in works]  # type: ignore[arg-type]
        return Saving(
            sampler=sampler,
            steps=steps,
            threshold=threshold,
            saved=fmean(saved for _, saved in drawn) if threshold else 0.5,
            error=fmean(_difference(image, right) for (image, _), right in zip(drawn, exact, strict=True)),
        )

    return [
        *(against(threshold, step_cache=threshold) for threshold in THRESHOLDS),
        against(None, num_inference_steps=steps // 2),
    ]


def _draw(runner: Runner, work: Work) -> tuple[Picture, float]:
    """The image alone, and the share of its forward passes that were not made."""
    row = runner.rows(work)[0]
    before = runner.reused_predictions
    runner.begin(row, work, None)
    for _ in range(row.steps):
        for error in runner.step([row]).values():
            raise error
    return runner.decode(runner.release(row)), (runner.reused_predictions - before) / row.steps


def _difference(one: Picture, other: Picture) -> float:
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())
