"""The JSON of placements: what each was planned to hold, and how its replicas do."""

from __future__ import annotations

from typing import Literal

from serve.api.fields import Schema
from serve.fleet import PlaceInfo, ReplicaInfo
from serve.jobs.terms import CardUse
from serve.memory.planner import Plan
from serve.rungs import Rung


class PlanView(Schema):
    """What one image of the planned size takes of the card. Bytes are of the replica's share of it."""

    rung: Rung
    """How far down the memory ladder the model begins; `resident` is the best."""
    dtype: str
    width: int
    """Pixels of the planned size."""
    height: int
    """Pixels of the planned size."""
    peak_bytes: int
    """The most that is predicted to be in use at a time."""
    budget_bytes: int
    """What each replica is held to."""

    @classmethod
    def of(cls, plan: Plan) -> PlanView:
        names = ("rung", "dtype", "width", "height")
        own = {name: getattr(plan, name) for name in names}
        return cls(**own, peak_bytes=plan.footprint.peak, budget_bytes=plan.budget)


class CardView(Schema):
    """Bytes of a replica's GPU."""

    allowed_bytes: int
    """What the replica is held to."""
    planned_bytes: int | None
    """What one image of the planned size was predicted to take at most."""
    used_bytes: int
    """In use now."""
    peak_bytes: int
    """In use at most so far."""

    @classmethod
    def of(cls, card: CardUse) -> CardView:
        return cls(allowed_bytes=card.allowed, planned_bytes=card.planned, used_bytes=card.used, peak_bytes=card.peak)


class ReplicaView(Schema):
    """A replica that reported within the last half minute."""

    rung: Rung | None
    """How far down the memory ladder it is by now: below the plan's where memory ran out."""
    images_at_once: int
    """Images of one step at most."""
    card: CardView | None
    """Null where it computes on no CUDA GPU."""

    @classmethod
    def of(cls, info: ReplicaInfo) -> ReplicaView:
        card = None if info.card is None else CardView.of(info.card)
        return cls(rung=info.rung, images_at_once=info.images_at_once, card=card)


class PlacementView(Schema):
    """One model on one kind of GPU."""

    name: str
    model: str
    gpu_class: str | None
    """Null where its replicas run on any node."""
    max_pixels: int
    """Most pixels (width x height) of an image that is drawn here."""
    max_size: tuple[int, int]
    """Width and height of the largest square among them."""
    plan: PlanView | None
    """Null where the GPU class is not declared: each replica plans by the card that it finds."""
    replicas_wanted: int
    """Fewest that there are to be."""
    replicas_max: int
    """Most that there may be, where they grow with the work."""
    replicas: tuple[ReplicaView, ...]
    """Those that live."""

    @classmethod
    def of(cls, info: PlaceInfo) -> PlacementView:
        names = ("name", "model", "gpu_class", "max_pixels", "max_size", "replicas_wanted", "replicas_max")
        return cls(
            **{name: getattr(info, name) for name in names},
            plan=None if info.plan is None else PlanView.of(info.plan),
            replicas=tuple(map(ReplicaView.of, info.replicas)),
        )


class FleetView(Schema):
    """Every placement, in the order of the settings."""

    object: Literal["list"] = "list"
    data: tuple[PlacementView, ...]
