"""A job and what becomes of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from serve.domain.orders import ImageRequest, Priority
from serve.domain.text import CacheReport, Note, Tier, TokenCount, Truncation
from serve.rungs import Rung


class JobState(enum.StrEnum):
    """queued -> encoding -> running -> storing -> one of the four terminal states.

    A worker holds the job from `encoding` (it collects the text) to `storing` (the images are drawn). A lost lease, a
    retry and a release lead from there back to `queued`.
    """

    QUEUED = "queued"
    ENCODING = "encoding"
    RUNNING = "running"
    STORING = "storing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def held(self) -> bool:
        """A worker has it."""
        return self in (JobState.ENCODING, JobState.RUNNING, JobState.STORING)

    @property
    def terminal(self) -> bool:
        return self is not JobState.QUEUED and not self.held


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where a job's time went: seconds of its stages, which follow one another in this order and don't overlap. None is
    a stage that it had not, or has not come to; `serve.stages` has their sum. They are those of its last attempt.

        admission_s    the order's arrival at the ingress -> it is logged
        retried_s      earlier attempts, and the waits before them
        queued_s       it (last) joined the queue -> claimed
        claim_s        claimed -> the replica begins
        text_s         plan, collect the text units, compose; `text_from` is the slowest tier that it waited for
        input_s        fetch and decode the images that it starts from
        source_s       wait for the VAE's thread, encode those
        batch_s        in the step loop, but in no step: it waits for its turns
        steps_s        in steps, which it shares with others' images
        decode_wait_s  after the last step: it waits for the VAE's thread
        decode_s       after the last step: the VAE decodes
        compress_s     PNG, JPEG or WebP, and the way there
        put_s          images and manifest into the result store
        told_s         settled -> a process that follows the job has read its end

    Two clocks tell them. Redis' tells admission, queue, `total_s` (logged -> settled) and `told_s`; the replica's
    monotonic one tells the rest. What no stage holds is the way between them: the settlement's round trip, above all.
    `admission_s` comes before `total_s`, `told_s` after it.

    `ahead_s` is how long the pools took for the text that was encoded while the job waited, beside the stages.
    `batch_images` is how many images, its own included, shared its steps on average. A job of several images is told by
    the one that ends last.
    """

    admission_s: float | None = None
    retried_s: float | None = None
    queued_s: float | None = None
    claim_s: float | None = None
    text_s: float | None = None
    text_from: Tier | None = None
    input_s: float | None = None
    source_s: float | None = None
    batch_s: float | None = None
    steps_s: float | None = None
    decode_wait_s: float | None = None
    decode_s: float | None = None
    compress_s: float | None = None
    put_s: float | None = None
    total_s: float | None = None
    told_s: float | None = None
    ahead_s: float | None = None
    batch_images: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRef:
    """One stored image. `key` is its key in the result store; `bytes` its size there."""

    index: int
    key: str
    seed: int
    width: int
    height: int
    content_type: str
    bytes: int


class WebhookState(enum.StrEnum):
    """Of telling a job's end to the client's address."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobError:
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Relief:
    """Memory ran out in a phase, and a measure was taken before that was tried again.

    The phases are those of the engine: `begin` an image, `encode` what it starts from, `step`, `decode`. The measures:

        fewer_images    of a step; the others wait for the next one
        fewer_lanes     of one image at a time
        between_steps   what was to be computed beside the steps, with nothing else under way
        tiles_512       in tiles of so many pixels a side; tiles_256 too
        <rung>          of the memory ladder: all images of the replica are on it from then on
        another_card    the job waits for a placement with more memory
        another_time    there is none with more: it waits for the same kind
    """

    phase: str
    measure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """How a job fared for memory, over all of its attempts.

    `rung` is that of the memory ladder on which it was drawn, None until it is. `retries` is how often memory ran out
    and something was tried again; `relief` are the first of these, in order. `above_mb` (1e6 bytes) is what the
    placements have that gave it back for one with more, None where none did.
    """

    rung: Rung | None = None
    retries: int = 0
    relief: tuple[Relief, ...] = ()
    above_mb: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A copy of a job's record at one moment. Times are Unix seconds on the job store's clock.

    `owner` is the caller who ordered it. `position` is 1 for the job of its model that is claimed next, None once it is
    claimed; `eta_s` the predicted seconds until it ends, None once it has. `cost_ms` is the predicted share of a
    replica's time. `attempt` counts the attempts at it. `approximate` names what kept the images from being exact:
    `step_cache`, `tiny_vae`, `tiled_vae`, `int8`, `int4`. `memory` is None until an attempt has ended that drew
    something or ran out of memory. `webhook` is the address that hears of its end, and `webhook_state` how far that
    came. `notes` say what was read otherwise than it was written.
    """

    id: str
    state: JobState
    request: ImageRequest
    attempt: int
    step: int
    steps: int
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    owner: str = ""
    priority: Priority = Priority.INTERACTIVE
    position: int | None = None
    eta_s: float | None = None
    cost_ms: int = 1
    webhook: str | None = None
    webhook_state: WebhookState | None = None
    tokens: tuple[TokenCount, ...] = ()
    truncated: tuple[Truncation, ...] = ()
    notes: tuple[Note, ...] = ()
    cache: CacheReport | None = None
    timings: Timings = field(default_factory=Timings)
    images: tuple[ImageRef, ...] = ()
    approximate: tuple[str, ...] = ()
    memory: MemoryReport | None = None
    error: JobError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """One entry of a job's event stream. `id` orders the stream and resumes it; `step` counts denoising steps done.

    `attempt` counts the attempts that were used by then. `fence` is the number of the claim that it happened under, 0
    before the first. `preview`, where the entry is one, is a JPEG file: image `index` of the job as it looks after that
    step.
    """

    id: str
    state: JobState
    step: int
    steps: int
    attempt: int = 0
    fence: int = 0
    index: int | None = None
    preview: bytes | None = None


@dataclass(frozen=True, slots=True)
class StepEvent:
    """`step` of `steps` forward passes are done for the slowest image of a run, which is one attempt at a job."""

    run_id: str
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """A JPEG file of image `index` of a run as it looks after `step` of `steps` forward passes: one pixel a latent."""

    run_id: str
    index: int
    step: int
    steps: int
    data: bytes
