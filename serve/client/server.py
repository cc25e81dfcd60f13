"""What the server says of itself, and what an order would come to, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from serve.callers import Scope
from serve.domain.orders import Task
from serve.domain.text import Note, TokenCount, Truncation
from serve.rungs import Rung


@dataclass(frozen=True, slots=True, kw_only=True)
class Concept:
    """A learned concept, `<name>` in a prompt. `vectors` has how many of each text encoder, by role; `fault` says why
    the model can't use it."""

    name: str
    vectors: Mapping[str, int]
    fault: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A served model and what an order gets by default. Sizes are pixels. `created` is when the server's copy of it was
    made, in Unix seconds. All but the first seven are None or empty for one whose text alone is served."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "tandem"
    family: str
    images: bool
    concepts: tuple[Concept, ...] = ()
    tasks: tuple[Task, ...] = ()
    default_width: int | None = None
    default_height: int | None = None
    size_multiple: int | None = None
    max_side: int | None = None
    max_pixels: int | None = None
    aspect_ratios: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    schedulers: tuple[str, ...] = ()
    guidance: Literal["classifier_free", "embedded", "none"] | None = None
    default_num_inference_steps: int | None = None
    quality_steps: Mapping[str, int] = field(default_factory=dict)
    default_guidance_scale: float | None = None
    default_strength: float | None = None
    step_cache: bool | None = None
    tiny_vae: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One bound. `unit` is what it counts; `reset_s` the seconds until all of it is back, `window_s` those in which all
    of it comes back, None where time brings nothing."""

    name: str
    unit: str
    limit: int
    remaining: int
    reset_s: float
    window_s: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the caller may do. `weight` is the share of the replicas' time beside other callers."""

    scopes: tuple[Scope, ...]
    weight: float
    limits: tuple[Limit, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one image of the planned size takes of a replica's share of a card, in pixels and bytes."""

    rung: Rung
    dtype: str
    width: int
    height: int
    peak_bytes: int
    budget_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Bytes of a replica's GPU."""

    allowed_bytes: int
    planned_bytes: int | None
    used_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One that lives. `card` is None where it computes on no CUDA GPU."""

    rung: Rung | None
    images_at_once: int
    card: Card | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One model on one kind of GPU. `max_size` is the width and height of the largest square of `max_pixels`;
    `replicas_wanted` are the fewest that there are to be, `replicas_max` the most that there may be."""

    name: str
    model: str
    gpu_class: str | None
    max_pixels: int
    max_size: tuple[int, int]
    plan: Plan | None
    replicas_wanted: int
    replicas_max: int
    replicas: tuple[Replica, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A kind of replica that can draw an order."""

    name: str
    gpu_class: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """What an order would be answered with instead of being queued."""

    code: str
    message: str
    retry_after_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """What an order would come to. `cost_ms` is the predicted share of a replica's time, `position` its place at worst,
    `eta_s` the predicted seconds until it ends from there."""

    request: Mapping[str, Any]
    template: str | None
    arm: str | None
    tokens: tuple[TokenCount, ...]
    truncated: tuple[Truncation, ...]
    notes: tuple[Note, ...]
    cost_ms: int
    cost_known: bool
    position: int
    eta_s: float
    placements: tuple[Place, ...]
    would_be_refused: Refused | None
    dry_run: bool = True
