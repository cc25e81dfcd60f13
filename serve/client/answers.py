"""What the server says of jobs: its JSON as frozen dataclasses. A field that an older server does not tell has its
default."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from serve.client.errors import NotTandem
from serve.client.orders import Order
from serve.domain.jobs import JobError, JobState, MemoryReport, Timings, WebhookState
from serve.domain.orders import Priority
from serve.domain.text import CacheReport, Note, TokenCount, Truncation

T = TypeVar("T")

_READERS: dict[Any, TypeAdapter[Any]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """One part of the server, as `/readyz` tells it."""

    name: str
    ready: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a job stands; `step` counts denoising steps done out of `steps`, `attempt` how often it was started."""

    state: JobState
    step: int
    steps: int
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview(Progress):
    """A small JPEG of image `index` after `step`."""

    index: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """A picture that the server keeps. Sizes are pixels; `bytes` is the size of the file at `url`, which is a path."""

    index: int
    url: str
    seed: int
    width: int
    height: int
    content_type: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Progress):
    """A job as the server told it. Times are Unix seconds.

    `position` is None unless it waits, `eta_s` once it has ended: it predicts the seconds until then. `cost_ms` is the
    predicted share of a replica's time. `request` is the order with every default filled in; `raw` the JSON itself.
    """

    id: str
    request: Mapping[str, Any]
    raw: Mapping[str, Any] = field(repr=False)
    priority: Priority = Priority.INTERACTIVE
    position: int | None = None
    eta_s: float | None = None
    cost_ms: int = 0
    template: str | None = None
    arm: str | None = None
    tokens: tuple[TokenCount, ...] = ()
    truncated: tuple[Truncation, ...] = ()
    notes: tuple[Note, ...] = ()
    cache: CacheReport | None = None
    timings: Timings = field(default_factory=Timings)
    images: tuple[ImageInfo, ...] = ()
    approximate: tuple[str, ...] = ()
    memory: MemoryReport | None = None
    error: JobError | None = None
    webhook_state: WebhookState | None = None
    created_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None

    @property
    def model(self) -> str:
        return str(self.request["model"])

    @property
    def seed(self) -> int:
        return int(self.request["seed"])

    @property
    def order(self) -> Order:
        """Ordering it again repeats the pictures."""
        return cast(Order, self.request)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that was drawn: `data` is its file."""

    job: Job
    info: ImageInfo
    data: bytes = field(repr=False)

    @property
    def seed(self) -> int:
        return self.info.seed

    @property
    def reference(self) -> str:
        """What an order names it by as its `image`."""
        return f"{self.job.id}/{self.info.index}"

    def save(self, path: str | Path) -> None:
        """The file as the server made it, whatever the path's ending says. Raises OSError."""
        Path(path).write_bytes(self.data)


def told(kind: type[T], answer: Any) -> T:
    """The answer as one of the dataclasses here. Raises NotTandem."""
    try:
        read: T = _reader(kind).validate_python(answer)
        return read
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise NotTandem(f"the answer can't be read: {place}: {error.errors()[0]['msg']}", "url") from error


def _reader(kind: Any) -> TypeAdapter[Any]:
    """Made when it is needed: that takes a while."""
    return _READERS.get(kind) or _READERS.setdefault(kind, TypeAdapter(kind))


def job_of(answer: Mapping[str, Any]) -> Job:
    return told(Job, {**answer, "raw": answer})


def event_of(event: Mapping[str, Any]) -> Progress:
    """The data of an event `state`, `step` or `preview`."""
    if "image" in event:
        return told(Preview, {**event, "data": base64.b64decode(event["image"].partition(",")[2])})
    return told(Progress, event)
