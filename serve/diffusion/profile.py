"""How long a step takes and how many images are worth it: measured at the first start, refined by every step."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from serve.diffusion import curves as by_curve
from serve.diffusion.curves import Curve, area, best_lanes, unmeasured_lanes
from serve.diffusion.profile_file import Measured, read, write
from serve.diffusion.runner import Latents, Runner
from serve.diffusion.scheduler import SHORTEST_MS, LatentShape
from serve.errors import GenerationFailed, OutOfMemory
from serve.models import ModelFolder
from serve.settings import DiffusionSettings

log = logging.getLogger(__name__)

MEMORY = 0.9
"""Share of the process's device memory that a measured step, and a decoding beside it, may reach."""
ROUNDS = 2
"""How often every batch is measured again after the first time."""
IN_VAIN = 8
"""Batches that many times larger than the best so far are measured, larger ones not."""
SIDES = (1.0, 0.5, 1.5, 2.0)
"""Sizes that are measured, in this order, as multiples of the model's default width and height."""
LEARNING = 0.1
OUTLIER = 4.0
"""A step that took this many times longer than expected (it compiled, the machine slept) counts as no longer."""
KEPT_SHAPES = 256
"""Sizes whose own step times are remembered, the last used."""


class Profile:
    """The most lanes of a step, and a step's time, for every latent shape. All methods may be called from any thread.

    `step_ms` is what a step of that many lanes takes of the device: sampler included, decoding beside it and the
    queueing before it not. A run's own share of the loop, for an estimate of its cost, is `steps` x
    `step_ms(shape, lanes it shares a step with)` / rows in that step. It is exact to a few per cent for sizes and
    batches that were stepped before. For others it follows the measured curves by load (lanes x area), times what was
    learned at the nearest batch of that size: within tens of per cent between measured sizes; too low by up to the
    ratio of areas far above the largest, where attention outgrows everything, until the first step there. 0 where
    nothing was measured or learned.

    Owns: the learned times and limits. They end with the process: another start may find another device beside it.
    """

    def __init__(self, max_batch_size: int, curves: Iterable[Curve] = ()) -> None:
        self.max_batch_size = max_batch_size
        """Most images of a step."""
        self._curves = sorted(curves, key=lambda curve: curve.area)
        self._learned: OrderedDict[LatentShape, dict[int, float]] = OrderedDict()
        self._limits: dict[int, float] = {}
        self._lock = threading.Lock()

    def lanes(self, shape: LatentShape) -> int:
        """The most lanes of a step for latents of this (height, width): at least 1, at most two an image."""
        most = 2 * self.max_batch_size
        if self._curves:
            most = min(most, by_curve.cap(self._curves, shape))
        with self._lock:
            loads = [load for above, load in self._limits.items() if above <= area(shape)]
        return max(1, min([most, *(int(load / area(shape)) for load in loads)]))

    def step_ms(self, shape: LatentShape, lanes: int) -> float:
        with self._lock:
            return self._step_ms(shape, lanes)

    def learn(self, shape: LatentShape, lanes: int, ms: float) -> None:
        """A step of that many lanes took `ms`. The first one of a size and batch is believed, unless it was measured;
        further ones make an exponential mean."""
        with self._lock:
            expected = self._step_ms(shape, lanes)
            learned = self._learned.setdefault(shape, {})
            self._learned.move_to_end(shape)
            if expected:
                ms = min(ms, OUTLIER * expected)
            if lanes in learned or any(curve.shape == shape and lanes in curve.ms for curve in self._curves):
                ms = expected + LEARNING * (ms - expected)
            learned[lanes] = ms
            if len(self._learned) > KEPT_SHAPES:
                self._learned.popitem(last=False)

    def limit(self, shape: LatentShape, lanes: int) -> None:
        """The device had no memory for that many lanes: from now on three quarters of that load (lanes x area), here
        and for larger shapes. Smaller ones stay."""
        load = 0.75 * lanes * area(shape)
        with self._lock:
            self._limits[area(shape)] = min(load, self._limits.get(area(shape), load))
        log.warning("%d lanes at latents of %dx%d ran out of memory: %d from now on", lanes, *shape, self.lanes(shape))

    def _step_ms(self, shape: LatentShape, lanes: int) -> float:
        learned = self._learned.get(shape)
        if not learned:
            return self._measured_ms(shape, lanes) if self._curves else 0.0
        if lanes in learned:
            return learned[lanes]
        nearest = min(learned, key=lambda other: abs(other - lanes))
        return learned[nearest] * self._measured_ms(shape, lanes) / self._measured_ms(shape, nearest)

    def _measured_ms(self, shape: LatentShape, lanes: int) -> float:
        """By the curves; without any, in a unit of its own that is in proportion to the lanes."""
        return by_curve.step_ms(self._curves, shape, lanes) if self._curves else float(lanes)


def open_profile(
    runner: Runner,
    model: ModelFolder,
    settings: DiffusionSettings,
    data_dir: Path,
    memory: Callable[[], float] | None = None,
) -> Profile:
    """The profile from its file under `data_dir`, else measured within `settings.profile_s` and written there.

    The file is named after all that step times depend on. One that is broken, or was cut short by a smaller
    `profile_s`, is measured again. With `profile_s` 0 nothing is measured: a step takes `max_batch_size` images.
    `memory` says which share of the process's device memory was in use at most since it was last asked.
    """
    kept = read(runner, model, settings, data_dir)
    if kept is None or (kept.cut_s is not None and kept.cut_s < settings.profile_s):
        if not settings.profile_s:
            return Profile(settings.max_batch_size)
        kept = _measure(runner, model, settings, memory or (lambda: _peak(runner.family.device)))
        if kept.curves:
            write(kept, runner, model, settings, data_dir)
    return Profile(settings.max_batch_size, kept.curves)


def _measure(runner: Runner, model: ModelFolder, settings: DiffusionSettings, memory: Callable[[], float]) -> Measured:
    started = time.monotonic()
    budget = _Budget(started + settings.profile_s)
    curves: list[Curve] = []
    for shape in _shapes(model, settings, runner.family.vae.scale_factor):
        if curves and not budget.allows(by_curve.step_ms(curves, shape, 1)):
            continue
        if curve := _curve(runner, shape, settings, budget, memory):
            curves = sorted([*curves, curve], key=lambda each: each.area)
    took_s = time.monotonic() - started
    log.info(
        "measured steps of %s in %.1f s: %s",
        model.name,
        took_s,
        ", ".join(f"{h}x{w} latents, {curve.cap} lanes" for curve in curves for h, w in [curve.shape]),
    )
    return Measured(tuple(curves), settings.profile_s if budget.cut else None)


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
    beside = _decoding(runner, shape, memory)
    for lanes in _batches(most):
        if cut := bool(ms) and not budget.allows(ms[max(ms)] * lanes / max(ms)):
            break
        try:
            took_ms = _forward_ms(runner, shape, lanes)
            if budget.left or settings.compile:  # the first warms up, and may have waited for the compiler
                took_ms = min(took_ms, _forward_ms(runner, shape, lanes))
        except OutOfMemory:
            break
        if memory() + beside > MEMORY:
            break
        ms[lanes] = took_ms
        if lanes >= IN_VAIN * best_lanes(ms):
            break
    for _ in range(ROUNDS):
        for lanes in ms:
            if budget.left:
                ms[lanes] = min(ms[lanes], _forward_ms(runner, shape, lanes))
    if not ms:
        return None
    return Curve(shape, ms, min(most, unmeasured_lanes(ms)) if cut else best_lanes(ms))


def _forward_ms(runner: Runner, shape: LatentShape, lanes: int) -> float:
    return max(runner.measure(shape, lanes) * 1000, SHORTEST_MS)


def _decoding(runner: Runner, shape: LatentShape, memory: Callable[[], float]) -> float:
    """What decoding one image takes on top of what lies there, as `memory` tells it; 0 where there is none to tell of.

    A decoding that has no memory even now is none of the step's: the engine makes it between two steps.
    """
    memory()
    resting = memory()
    if not resting:
        return 0.0
    family = runner.family
    assert family.model.denoiser is not None, "a model for text only is never drawn with"
    size = (1, family.model.denoiser.latent_channels, *shape)
    with contextlib.suppress(GenerationFailed):
        runner.decode(Latents(torch.zeros(size, device=family.device, dtype=family.dtype), None, tiny=False))
    return memory() - resting


def _batches(most: int) -> Iterator[int]:
    lanes = 1
    while lanes < most:
        yield lanes
        lanes *= 2
    yield most


def _shapes(model: ModelFolder, settings: DiffusionSettings, factor: int) -> list[LatentShape]:
    """Latent shapes to measure: the model's default size first. Larger ones than are drawn here are left out."""
    denoiser = model.denoiser
    assert denoiser is not None, "a model for text only is never drawn with"
    grid = denoiser.size_multiple
    found: dict[LatentShape, None] = {}
    for scale in SIDES:
        height, width = (
            max(grid, int(side * scale) // grid * grid) for side in (denoiser.default_height, denoiser.default_width)
        )
        if settings.max_pixels is None or height * width <= settings.max_pixels:
            found[(height // factor, width // factor)] = None
    return list(found)


def _peak(device: torch.device) -> float:
    """Share of the memory that this process may take of its GPU which was allocated at most since the last call."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    return peak / (total * torch.cuda.get_per_process_memory_fraction(device))
