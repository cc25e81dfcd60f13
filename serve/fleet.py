"""What every placement was planned to hold, and what its replicas say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serve.domain.orders import ImageRequest
from serve.errors import InvalidRequest
from serve.jobs.terms import CardUse, WorkerReport
from serve.memory.planner import Plan
from serve.placements import Fleet, Placement, held_size
from serve.rungs import Rung


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaInfo:
    """One that lives, as it reported within the last half minute. `card` is None where it computes on no CUDA GPU."""

    rung: Rung | None
    images_at_once: int
    card: CardUse | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceInfo:
    """A placement. `replicas_wanted` and `replicas_max` are the fewest and the most of the settings, `replicas` those
    that live. `max_size` is the largest square of `max_pixels`, in pixels. `plan` is None where the GPU class is not
    declared: each replica then plans by the card that it finds, and once all have, `max_pixels` is the most that one of
    them holds."""

    name: str
    model: str
    gpu_class: str | None
    max_pixels: int
    max_size: tuple[int, int]
    plan: Plan | None
    replicas_wanted: int
    replicas_max: int
    replicas: tuple[ReplicaInfo, ...]


def place_info(placement: Placement, reports: Sequence[WorkerReport]) -> PlaceInfo:
    """`reports` may be of all workers of the model."""
    alive, most = _alive(placement, reports), held_pixels(placement, reports)
    return PlaceInfo(
        name=placement.name,
        model=placement.model,
        gpu_class=placement.gpu_class,
        max_pixels=most,
        max_size=held_size(1, 1, most),
        plan=placement.plan,
        replicas_wanted=placement.settings.least_replicas,
        replicas_max=placement.settings.most_replicas,
        replicas=tuple(ReplicaInfo(rung=each.rung, images_at_once=each.batch, card=each.card) for each in alive),
    )


def held_pixels(placement: Placement, reports: Sequence[WorkerReport]) -> int:
    """The largest image that the placement holds: by its plan, or where each replica has its own, by what they say.
    While one of them is away it is not known, and anything goes: the largest card may be the one that starts again."""
    told = [each.max_pixels for each in _alive(placement, reports)]
    known = placement.plan is None and len(told) >= max(1, placement.settings.most_replicas)
    return max(told) if known else placement.max_pixels


def check_replicas(fleet: Fleet, request: ImageRequest, reports: Sequence[WorkerReport]) -> None:
    """What `Fleet.check` can't know: raises InvalidRequest naming `width` where the replicas that live have found cards
    which hold no such image, and there is no placement besides that might."""
    most = max((held_pixels(each, reports) for each in fleet.for_model(request.model)), default=0)
    if request.pixels > most:
        wide, high = held_size(request.width, request.height, most)
        raise InvalidRequest(
            f"{request.width} x {request.height} is {request.pixels} pixels; the GPUs that draw {request.model} here "
            f"hold {most}, such as {wide} x {high}",
            "width",
        )


def _alive(placement: Placement, reports: Sequence[WorkerReport]) -> list[WorkerReport]:
    return [each for each in reports if each.placement == placement.name]
