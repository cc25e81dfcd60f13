"""How long a step takes and how many images are worth it: measured at the first start, refined by every step."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

from serve.diffusion import curves as by_curve
from serve.diffusion.curves import Curve, area
from serve.diffusion.profile_file import identity, read, write
from serve.diffusion.profiling import measure, peak_memory, shapes_to_measure
from serve.diffusion.runner import Runner
from serve.diffusion.scheduler import LatentShape
from serve.models import ModelFolder
from serve.settings.pools import DiffusionSettings

log = logging.getLogger(__name__)

LEARNING = 0.1
OUTLIER = 4.0
"""A step that took this many times longer than expected (it compiled, the machine slept) counts as no longer."""
SHRINKING = 0.75
"""What is left of a load (lanes x area) that ran out of memory."""
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

    def __init__(
        self, max_batch_size: int, curves: Iterable[Curve] = (), too_large: Iterable[LatentShape] = ()
    ) -> None:
        """`too_large` are shapes of which not even one lane fits the memory."""
        self.max_batch_size = max_batch_size
        """Most images of a step."""
        self._curves = sorted(curves, key=lambda curve: curve.area)
        self._learned: OrderedDict[LatentShape, dict[int, float]] = OrderedDict()
        self._limits: dict[int, float] = {area(shape): SHRINKING * area(shape) for shape in too_large}
        self._forgotten = False
        self._lock = threading.Lock()

    def lanes(self, shape: LatentShape) -> int:
        """The most lanes of a step for latents of this (height, width): at least 1, at most two an image."""
        with self._lock:
            return self._lanes(shape)

    def step_ms(self, shape: LatentShape, lanes: int) -> float:
        with self._lock:
            return self._step_ms(shape, lanes)

    def curves(self, most: int) -> tuple[Curve, ...]:
        """What steps take by now, of at most so many shapes: the measured ones first, then those stepped last. Each
        ends at the most lanes of a step there, which is its cap."""
        with self._lock:
            measured = {curve.shape: set(curve.ms) for curve in self._curves}
            shapes = islice(dict.fromkeys([*measured, *reversed(self._learned)]), most)
            return tuple(
                self._present(shape, measured.get(shape, set()) | self._learned.get(shape, {}).keys())
                for shape in shapes
            )

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
        load = SHRINKING * lanes * area(shape)
        with self._lock:
            self._limits[area(shape)] = min(load, self._limits.get(area(shape), load))
        log.warning("%d lanes at latents of %dx%d ran out of memory: %d from now on", lanes, *shape, self.lanes(shape))

    def relax(self, *, times: bool) -> None:
        """The device has other memory than before: what did not fit may fit now. With `times`, steps take other times
        too: none is known until it was made. The first one of a size is of one image then, so that what larger batches
        take is known before they are made."""
        with self._lock:
            self._limits.clear()
            if times:
                self._forgotten = True
                self._curves.clear()
                self._learned.clear()

    def _lanes(self, shape: LatentShape) -> int:
        most = 2 * self.max_batch_size
        if self._curves:
            most = min(most, by_curve.cap(self._curves, shape))
        elif self._forgotten and shape not in self._learned:
            most = min(most, 2)
        loads = [load for above, load in self._limits.items() if above <= area(shape)]
        return max(1, min([most, *(int(load / area(shape)) for load in loads)]))

    def _present(self, shape: LatentShape, known: Iterable[int]) -> Curve:
        cap = self._lanes(shape)
        lanes = sorted({cap, *(each for each in known if each < cap)})
        return Curve(shape, {each: self._step_ms(shape, each) for each in lanes}, cap)

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
    `profile_s`, is measured again. With `profile_s` 0 nothing is measured: without a file of an earlier start, a step
    takes `max_batch_size` images. `memory` says which share of the process's device memory was in use at most since it
    was last asked.
    """
    shapes = shapes_to_measure(model, settings, runner.family.vae.scale_factor)
    what = identity(runner, model, settings, shapes)
    kept = read(what, data_dir)
    if kept is None or (kept.cut_s is not None and kept.cut_s < settings.profile_s):
        if not settings.profile_s:
            return Profile(settings.max_batch_size)
        kept = measure(runner, shapes, settings, memory or (lambda: peak_memory(runner.family.device)))
        if kept.curves:
            write(kept, what, data_dir)
    return Profile(settings.max_batch_size, kept.curves, kept.too_large)
