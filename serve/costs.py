"""What a job will cost, in milliseconds of a replica, predicted from what the replicas tell of their steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import is_

from serve.diffusion.curves import Curve, cap, step_ms
from serve.domain.orders import ImageRequest
from serve.jobs.records import steps_of
from serve.jobs.terms import Crew, StepCurve, WorkerReport
from serve.models.samplers import forwards_of

FALLBACK_MS = 100.0
"""Of a forward pass, for each megapixel of an image and batch entry, where no replica has reported: about SDXL on a
card of the middle. It only sets jobs in proportion until a replica of the model is there."""
KEPT = 1024
"""Sizes and batches whose step times are kept of one crew."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """`cost_ms` is the share of one replica's time that the job takes where its images share full steps, `alone_ms` the
    time on an idle replica. `replicas` is how many can draw it as far as is known, at least 1. `known` is whether one
    that can has told of its steps, be it that it sleeps by now: else the figures only put jobs in proportion.
    """

    cost_ms: int
    alone_ms: int
    replicas: int
    known: bool


class Costs:
    """Predicts by the reports of a model's replicas.

    A forward pass costs an image its part of a full step at its size. Decoding goes on beside the steps, on a thread of
    its own: a replica gets through the slower of the two, so that an image costs the longer of its two times. A job is
    drawn by whoever is free first, the more often the faster it is: so the mean over replicas is the harmonic one, and
    a queue's cost over the replicas is the time in which they draw it.

    Not in it: what is read before and stored after, which happens beside the steps of others; an image to start from
    being encoded; previews; what `step_cache` saves; sizes that share no step with others. `WorkerReport.pace` says
    what all that comes to on a replica.

    Owns: the step times read from the last crew of each model, and its reports, by whose identity it is known again.
    """

    def __init__(self) -> None:
        self._last: dict[str, _Times] = {}

    def estimate(self, request: ImageRequest, crew: Crew) -> Estimate:
        """By those that can hold the image; where none can, by the others of its model; where nobody told, by a formula
        of pixels, lanes and steps."""
        times = self._last.get(request.model)
        if times is None or not times.are_of(crew):
            times = self._last[request.model] = _Times(crew, request.model)
        able, known, passes = times.of(request)
        forwards, images = _forwards(request), request.num_images
        if not passes:
            cost = alone = images * forwards * request.lanes * request.pixels / 1e6 * FALLBACK_MS
        else:
            cost = len(passes) / sum(1 / cost_ms(request, each.share_ms, each.decode_ms) for each in passes)
            alone = min(forwards * each.alone_ms + images * each.decode_ms for each in passes)
        return Estimate(max(1, round(cost)), max(1, round(alone)), max(1, able), known)


def cost_ms(request: ImageRequest, share_ms: float, decode_ms: float) -> float:
    """Of a replica where an image's part of a full step takes `share_ms`, and its decoding `decode_ms`."""
    return request.num_images * max(_forwards(request) * share_ms, decode_ms)


@dataclass(frozen=True, slots=True)
class _Pass:
    """Milliseconds at one replica: an image's share of a full step; all of a job's images making one step with nobody
    beside them; an image's decoding."""

    share_ms: float
    alone_ms: float
    decode_ms: float


class _Replica:
    """A report, ready to be read at any size."""

    def __init__(self, report: WorkerReport) -> None:
        self.max_pixels = report.max_pixels
        self._factor = report.vae_factor
        self._batch = report.batch
        self._decode_ms = report.decode_ms_per_megapixel
        curves = [_curve(each) for each in report.curves if each.ms]
        self.curves = sorted(curves, key=lambda curve: curve.area)
        self._stepped = {curve.shape: curve for curve in curves}

    def at(self, width: int, height: int, lanes: int, images: int) -> _Pass:
        """For so many images of that size in pixels, each of so many lanes."""
        shape = (height // self._factor, width // self._factor)
        own = self._stepped.get(shape)
        curves: Sequence[Curve] = self.curves if own is None else (own,)
        full = max(1, min(cap(curves, shape) // lanes, self._batch))
        full_ms = step_ms(curves, shape, full * lanes)
        alone_ms = step_ms(curves, shape, images * lanes) if images < full else images * full_ms / full
        return _Pass(full_ms / full, alone_ms, self._decode_ms * width * height / 1e6)


class _Times:
    """What one crew told, by size and batch."""

    def __init__(self, crew: Crew, model: str) -> None:
        self._crew = crew
        self._replicas = [_Replica(report) for report in crew.reports if report.model == model]
        self._asleep = [_Replica(report) for report in crew.asleep if report.model == model]
        self._kept: dict[tuple[int, int, int, int], tuple[int, bool, list[_Pass]]] = {}

    def are_of(self, crew: Crew) -> bool:
        return all(
            len(mine) == len(its) and all(map(is_, mine, its))
            for mine, its in ((self._crew.reports, crew.reports), (self._crew.asleep, crew.asleep))
        )

    def of(self, request: ImageRequest) -> tuple[int, bool, list[_Pass]]:
        """How many that live can hold the image; the times at those that told of theirs, of the able, else of the able
        that sleep, else of any, and whether they are of able ones."""
        key = (request.width, request.height, request.lanes, request.num_images)
        found = self._kept.get(key)
        if found is None:
            able = [each for each in self._replicas if each.max_pixels >= request.pixels]
            asleep = [each for each in self._asleep if each.max_pixels >= request.pixels]
            told = [each for each in able or asleep or self._replicas if each.curves]
            if len(self._kept) >= KEPT:
                self._kept.clear()
            passes = [each.at(*key) for each in told]
            found = self._kept[key] = len(able), bool(passes and (able or asleep)), passes
        return found


def _forwards(request: ImageRequest) -> int:
    return forwards_of(request.scheduler, steps_of(request))


def _curve(told: StepCurve) -> Curve:
    """Its last point is the most lanes of a step. A larger batch takes no less than a smaller one: what says otherwise
    is noise."""
    lanes = sorted(told.ms)
    rising = accumulate((told.ms[each] for each in lanes), max)
    return Curve((told.height, told.width), dict(zip(lanes, rising, strict=True)), lanes[-1])
