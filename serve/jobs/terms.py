"""How a job is queued, what a submission comes to, and what workers say of themselves."""

from __future__ import annotations

import enum
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from serve.callers import Allowance, Limit
from serve.domain.jobs import Job, JobState
from serve.domain.orders import Arrival, Priority
from serve.rungs import Rung


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How a job is queued.

    `cost_ms` is the predicted share of one replica's time, `alone_ms` what an idle replica takes at least, `replicas`
    how many may draw it as far as is known: they bound the work that waits. `fingerprint` is that of the order as the
    client wrote it; with one, a further submission under the same name, which is the owner's `key` or else the id, must
    be the same order. `arrival` is the order's, where it came through this process.
    """

    owner: str = ""
    weight: float = 1.0
    priority: Priority = Priority.INTERACTIVE
    cost_ms: int = 1
    alone_ms: int = 0
    replicas: int = 1
    fingerprint: str | None = None
    key: str | None = None
    webhook: str | None = None
    arrival: Arrival | None = None
    allowance: Allowance = field(default=Allowance())


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """`replayed`: the order was logged before, and `job` is that one as it is now. `limits` are the owner's now."""

    job: Job
    replayed: bool = False
    limits: tuple[Limit, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPage:
    """Jobs, newest first; `next` goes on behind the last, None at the end."""

    jobs: tuple[Job, ...]
    next: str | None = None


class Hold(enum.Enum):
    """Why a worker that asks gets no job although jobs are queued."""

    ALONE = "alone"
    """It must be drawn with nothing beside it: finish what is in hand first."""
    UNFIT = "unfit"
    """Of what is queued it wants nothing, as it is now."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """`depth` jobs wait for any model; `cost_ms` of predicted work wait for the model, `held_ms` are left of what its
    workers have in hand."""

    depth: int
    cost_ms: int
    held_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """What of a model has not ended: jobs by state, milliseconds of predicted work that wait, milliseconds for which
    the job has waited that has waited longest (0 where none waits)."""

    model: str
    states: Mapping[JobState, int]
    cost_ms: int
    oldest_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of the store's Redis: what counts against its bound, and the bound, 0 where it has none."""

    used: int
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCurve:
    """Milliseconds of a step by lanes (batch entries), for latents of this height and width."""

    height: int
    width: int
    ms: Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CardUse:
    """Bytes of a worker's card. It may allocate `allowed`, and the largest image that it was planned for takes
    `planned` (None where nothing was planned); `used` are allocated now, `peak` were at most so far."""

    allowed: int
    used: int
    peak: int
    planned: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A worker's start: Unix seconds when its imports began, and the seconds of each phase from there, in order."""

    began_at: float
    phases: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """What a worker says of itself. `vae_factor` is how many pixels a latent has on each side; `max_rows` the images
    that it takes in hand at most, `batch` those of one step; `pace` what a predicted millisecond really takes there.
    `memory_mb` (1e6 bytes, 0 where it is not known) is what it has
    of its card, `rung` how far down the memory ladder it is by now; `card` is None where it computes on no CUDA GPU.
    `start_s` is what a cold start of its placement takes, `start` the part of that which is the worker's own."""

    name: str
    model: str
    placement: str
    gpu_class: str | None = None
    max_pixels: int
    max_rows: int
    batch: int
    vae_factor: int
    pace: float = 1.0
    curves: tuple[StepCurve, ...] = ()
    decode_ms_per_megapixel: float = 0.0
    rung: Rung | None = None
    memory_mb: int = 0
    card: CardUse | None = None
    start_s: float = 0.0
    start: Start | None = None


@dataclass(frozen=True, slots=True)
class Crew:
    """The workers of a model that live. `asleep` are the last reports of placements that had workers and have none:
    where nobody lives who can draw an image, they say what it will take."""

    reports: tuple[WorkerReport, ...] = field(default=())
    asleep: tuple[WorkerReport, ...] = field(default=())

    @property
    def pace(self) -> float:
        """What a predicted millisecond really takes, on average."""
        return statistics.fmean([report.pace for report in self.reports or self.asleep] or [1.0])

    def start_s(self, pixels: int) -> float:
        """Seconds that an order of such an image will wait for somebody to wake up; 0 where somebody is awake, and
        where nobody knows."""
        if any(report.max_pixels >= pixels for report in self.reports):
            return 0.0
        return min((report.start_s for report in self.asleep if report.max_pixels >= pixels), default=0.0)


REPORT = TypeAdapter(WorkerReport)
