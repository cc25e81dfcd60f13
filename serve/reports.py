"""What a diffusion replica says of itself, from which costs and waiting times are predicted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.costs import cost_ms
from serve.domain.orders import ImageRequest
from serve.jobs.terms import StepCurve, WorkerReport
from serve.placements import Placement
from serve.relief import memory_mb

if TYPE_CHECKING:
    from serve.diffusion.curves import Curve
    from serve.diffusion.profile import Profile

REPORTED_SHAPES = 24
REPORTED_POINTS = 64
"""Step times in a report at most, which keep it below 4 KiB."""
CURVE_POINTS = 6
"""Step times of one shape that are told as they are; more are thinned."""
MEMORY_MS = 60_000.0
"""Work at full batches after which what was known of the pace counts for a third."""
PRIOR_MS = 1_000.0
"""A pace of 1 is believed as much as so much work."""
LEAST_PACE, MOST_PACE = 0.2, 5.0
DECODE_MS = 200.0
"""Of a megapixel, until an image was decoded."""
DECODE_LEARNING = 0.1
DECODE_OUTLIER = 4.0
"""A decoding that took this many times longer than expected (it tried again, the machine slept) counts as no longer."""


@dataclass(slots=True)
class _Held:
    """A job in hand: its part of the time in which the replica was full, by images, and the whole of that time."""

    rows: int
    cost_ms: Callable[[], float]
    began_s: float
    first_ms: float
    part_s: float = 0.0
    full_s: float = 0.0


class Pace:
    """What a predicted millisecond takes at this replica, and what a megapixel takes to decode.

    Only the time counts in which a full batch was in hand: a job on a replica that is half idle takes longer than its
    share of a full step, which is no reason to promise less to a full queue. That time is dealt out to the jobs by
    images, as the step loop deals it out, and counted when a job was drawn; one that was cancelled or failed takes
    its part with it.

    For one event loop. Owns: the jobs in hand, as far as their time goes.
    """

    def __init__(self, batch: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        """`batch` says how many images fill a step; `clock` tells seconds."""
        self._batch = batch
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._since_s = clock()
        self._took_ms = self._predicted_ms = PRIOR_MS
        self._decode_ms = DECODE_MS
        self._decodings = 0

    @property
    def pace(self) -> float:
        """Milliseconds that passed for each predicted one, over the last minute or so of full batches; 1 at first."""
        return min(max(self._took_ms / self._predicted_ms, LEAST_PACE), MOST_PACE)

    @property
    def in_hand(self) -> int:
        """Jobs that have begun and whose images count still."""
        return len(self._held)

    @property
    def decode_ms_per_megapixel(self) -> float:
        return self._decode_ms

    def began(self, key: str, rows: int, cost_ms: Callable[[], float]) -> None:
        """So many images are in hand from now on; `key` names the attempt at the job. `cost_ms` tells what `cost_here`
        says, now and at the end: not the cost in the job's record: that is a mean over
        replicas, by what they had told when it was ordered, and a step that has become slower since would count twice,
        in later costs and in the pace."""
        self._deal()
        self._held[key] = _Held(rows, cost_ms, self._since_s, cost_ms())

    def ended(self, key: str, drawn: bool) -> None:
        """They no longer are. `drawn`: the job had what it cost. Unknown keys are passed over."""
        self._deal()
        job = self._held.pop(key, None)
        if job is None or not drawn or not job.full_s:
            return
        cost_ms = (job.first_ms + job.cost_ms()) / 2
        if not cost_ms:
            return
        took_ms = 1000 * job.part_s
        predicted_ms = cost_ms * job.full_s / (self._since_s - job.began_s)
        kept = math.exp(-took_ms / MEMORY_MS)
        self._took_ms = kept * self._took_ms + took_ms
        self._predicted_ms = kept * self._predicted_ms + predicted_ms

    def decoded(self, pixels: int, seconds: float) -> None:
        """The VAE took so long for images of so many pixels together. The mean at first, an exponential one later."""
        if pixels <= 0 or not 0 < seconds < math.inf:
            return
        ms = 1000 * seconds / (pixels / 1e6)
        self._decodings += 1
        if self._decodings > 1:
            ms = min(ms, DECODE_OUTLIER * self._decode_ms)
        self._decode_ms += max(1 / self._decodings, DECODE_LEARNING) * (ms - self._decode_ms)

    def _deal(self) -> None:
        """Deal out the time since the last change."""
        now_s = self._clock()
        took_s, self._since_s = now_s - self._since_s, now_s
        rows = sum(job.rows for job in self._held.values())
        if not rows or rows < self._batch():
            return
        for job in self._held.values():
            job.part_s += took_s * job.rows / rows
            job.full_s += took_s


def report_of(name: str, placement: Placement, profile: Profile, vae_factor: int, pace: Pace) -> WorkerReport:
    """The report of the replica `name`. May be called from any thread but for `pace`, which is its event loop's."""
    settings = placement.settings
    return WorkerReport(
        name=name,
        model=placement.model,
        placement=placement.name,
        gpu_class=placement.gpu_class,
        max_pixels=placement.max_pixels,
        max_rows=max(settings.max_rows, settings.max_batch_size),
        batch=settings.max_batch_size,
        vae_factor=vae_factor,
        pace=round(pace.pace, 3),
        curves=tuple(_told(profile)),
        decode_ms_per_megapixel=_rounded(pace.decode_ms_per_megapixel),
        memory_mb=memory_mb(placement),
    )


def cost_here(profile: Profile, vae_factor: int, pace: Pace, request: ImageRequest) -> float:
    """What `Costs` would say now if this replica were the only one and had just reported: what `Pace.began` wants."""
    shape, lanes = (request.height // vae_factor, request.width // vae_factor), request.lanes
    full = max(1, min(profile.lanes(shape) // lanes, profile.max_batch_size))
    share_ms = profile.step_ms(shape, full * lanes) / full
    return cost_ms(request, share_ms, pace.decode_ms_per_megapixel * request.pixels / 1e6)


def _told(profile: Profile) -> Iterator[StepCurve]:
    left = REPORTED_POINTS
    for curve in profile.curves(REPORTED_SHAPES):
        ms = {lanes: _rounded(curve.ms[lanes]) for lanes in _spread(curve) if 0 < curve.ms[lanes] < math.inf}
        if len(ms) > left:
            return
        if ms:
            left -= len(ms)
            height, width = curve.shape
            yield StepCurve(height=height, width=width, ms=ms)


def _spread(curve: Curve) -> list[int]:
    """Its lanes where they are few, else the last, then each that is at most half of the one before, and the first."""
    if len(curve.ms) <= CURVE_POINTS:
        return sorted(curve.ms)
    kept: list[int] = []
    for lanes in sorted(curve.ms, reverse=True):
        if not kept or 2 * lanes <= kept[-1] or lanes == min(curve.ms):
            kept.append(lanes)
    return kept[::-1]


def _rounded(value: float) -> float:
    """To four figures: what is beyond them is noise."""
    return float(f"{value:.4g}")
