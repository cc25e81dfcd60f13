"""Measuring steps at a replica's first start: made-up rows of a few sizes, in growing batches, within a time."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from serve.diffusion import curves as by_curve
from serve.diffusion.curves import Curve, area, best_lanes, unmeasured_lanes
from serve.diffusion.profile_file import Measured
from serve.diffusion.runner import Latents, Runner
from serve.diffusion.scheduler import SHORTEST_MS, LatentShape
from serve.errors import DeviceLost, GenerationFailed, OutOfMemory
from serve.memory.planner import USABLE
from serve.models import ModelFolder
from serve.rungs import MEANS
from serve.settings.pools import DiffusionSettings

log = logging.getLogger(__name__)

ROUNDS = 2
"""How often every batch is measured again after the first time."""
IN_VAIN = 8
"""Batches that many times larger than the best so far are measured, larger ones not."""
SIDES = (1.0, 0.5, 1.5, 2.0)
"""Sizes that are measured, in this order, as multiples of the model's default width and height."""


def measure(
    runner: Runner, shapes: Sequence[LatentShape], settings: DiffusionSettings, memory: Callable[[], float]
) -> Measured:
    """The curves of these latent shapes; the first is the model's default size, and must be one that can be stepped."""
    started = time.monotonic()
    budget = _Budget(started + settings.profile_s)
    curves: list[Curve] = []
    too_large: list[LatentShape] = []
    for shape in shapes:
        if any(area(shape) >= area(other) for other in too_large):
            continue
        if curves and not budget.allows(by_curve.step_ms(curves, shape, 1)):
            continue
        try:
            curve = _curve(runner, shape, settings, budget, memory)
        except DeviceLost:
            raise
        except (GenerationFailed, IndexError, ValueError) as error:
            if shape == shapes[0]:
                raise
            log.warning("steps at latents of %dx%d can't be measured", *shape, exc_info=error)
            continue
        if curve is None:
            log.warning("not one image at latents of %dx%d fits the memory", *shape)
            too_large.append(shape)
        else:
            curves = sorted([*curves, curve], key=lambda each: each.area)
    took_s = time.monotonic() - started
    log.info(
        "measured steps of %s in %.1f s: %s",
        runner.family.model.name,
        took_s,
        ", ".join(f"{h}x{w} latents, {curve.cap} lanes" for curve in curves for h, w in [curve.shape]),
    )
    return Measured(tuple(curves), tuple(too_large), settings.profile_s if budget.cut else None)


class _Budget:
    """Time for measuring. `cut` is set when something was left out for want of it."""

    def __init__(self, end: float) -> None:
        self._end = end
        self.cut = False

    @property
    def left(self) -> bool:
        return time.monotonic() < self._end

    def allows(self, ms: float) -> bool:
        """Whether there is time for two forward passes that take that long."""
        fits = time.monotonic() + 2 * ms / 1000 <= self._end
        self.cut = self.cut or not fits
        return fits


def _curve(
    runner: Runner, shape: LatentShape, settings: DiffusionSettings, budget: _Budget, memory: Callable[[], float]
) -> Curve | None:
    """None where not even one lane fits. Goes up until the device is full, the time over, or batches grow in vain.

    Every batch is measured several times, one after the other and not at a stretch, so that a moment in which the
    machine had other work to do hits none of them alone; the shortest counts, for noise only ever adds.
    """
    most, ms, cut = 2 * settings.max_batch_size, dict[int, float](), False
    # Where the VAE decodes between two steps, nothing of it is beside one.
    beside = _decoding(runner, shape, memory) if MEANS[runner.family.rung].decode == "beside" else 0.0
    for lanes in _batches(most):
        if cut := bool(ms) and not budget.allows(ms[max(ms)] * lanes / max(ms)):
            break
        try:
            took_ms = _forward_ms(runner, shape, lanes)
            if budget.left or settings.compile:  # the first warms up, and may have waited for the compiler
                took_ms = min(took_ms, _forward_ms(runner, shape, lanes))
        except OutOfMemory:
            break
        if memory() + beside > 1 and ms:  # one lane that fits is a step: what the VAE lacks then, it tries again
            break
        ms[lanes] = took_ms
        if lanes >= IN_VAIN * best_lanes(ms):
            break
    with contextlib.suppress(OutOfMemory):  # memory was there for each of these
        for lanes in [*ms] * ROUNDS:
            if budget.left:
                ms[lanes] = min(ms[lanes], _forward_ms(runner, shape, lanes))
    if not ms:
        return None
    return Curve(shape, ms, min(most, unmeasured_lanes(ms)) if cut else best_lanes(ms))


def _forward_ms(runner: Runner, shape: LatentShape, lanes: int) -> float:
    return max(runner.measure(shape, lanes) * 1000, SHORTEST_MS)


def _decoding(runner: Runner, shape: LatentShape, memory: Callable[[], float]) -> float:
    """What decoding one image takes on top of what lies there, as `memory` tells it; 0 where there is none to tell of.

    A decoding that has no memory even now leaves the steps alone: the engine makes it between two of them.
    """
    memory()
    resting = memory()
    if not resting:
        return 0.0
    family = runner.family
    assert family.model.denoiser is not None, "a model for text only is never drawn with"
    size = (1, family.model.denoiser.latent_channels, *shape)
    try:
        runner.decode(Latents(torch.zeros(size, device=family.device, dtype=family.dtype), None, tiny=False))
    except OutOfMemory:
        memory()
        return 0.0
    except DeviceLost:
        raise
    except GenerationFailed as error:  # what came out of zeros is no matter
        log.debug("a decoding of nothing: %s", error)
    return memory() - resting


def _batches(most: int) -> Iterator[int]:
    lanes = 1
    while lanes < most:
        yield lanes
        lanes *= 2
    yield most


def shapes_to_measure(model: ModelFolder, settings: DiffusionSettings, factor: int) -> list[LatentShape]:
    """Latent shapes: the model's default size first. Larger ones than are drawn here, or than the model has positions
    for, are left out."""
    denoiser = model.denoiser
    assert denoiser is not None, "a model for text only is never drawn with"
    grid = denoiser.size_multiple
    found: dict[LatentShape, None] = {}
    for scale in SIDES:
        height, width = (
            max(grid, int(side * scale) // grid * grid) for side in (denoiser.default_height, denoiser.default_width)
        )
        held = settings.max_pixels is None or height * width <= settings.max_pixels
        if held and (denoiser.largest_side is None or max(height, width) <= denoiser.largest_side):
            found[(height // factor, width // factor)] = None
    return list(found)


def peak_memory(device: torch.device) -> float:
    """What was allocated at most since the last call, as a share of what this process may take of its GPU: its plan's
    budget, and never more than a plan would use."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    return peak / (total * min(USABLE, torch.cuda.get_per_process_memory_fraction(device)))
