"""What a replica may use of the card that it finds, and on which rung it begins."""

from __future__ import annotations

import logging
from dataclasses import replace

from serve.devices import Card, gpu_usage
from serve.errors import OperatorError
from serve.jobs.terms import CardUse
from serve.memory.planner import Plan
from serve.memory.shapes import shape_of
from serve.models import ModelFolder
from serve.placements import Placement, held_size, plan_share, share_of
from serve.rungs import MEANS

log = logging.getLogger(__name__)


def planned_here(placement: Placement, model: ModelFolder, card: Card | None) -> Placement:
    """The placement with the plan that its replica is held to.

    Where the GPU class is declared, that is the class's, whatever card this is: replicas of one class promise the same.
    Else it is made for the card that is here, and the replica takes no larger images than that holds, unless the
    settings say how large they may be. Without a card nothing is planned. Raises OperatorError where not even the
    smallest image of the model is held on any rung that is allowed.
    """
    own = placement.settings
    if card is None or placement.gpu_class is not None:
        return placement
    share, shape = share_of(own), shape_of(model)
    made = plan_share(own, shape, card.memory_bytes * share, card.dtypes, placement.max_pixels)
    if made.max_pixels < shape.size_multiple**2:
        part = "" if share == 1 else f"{share:g} of "
        raise OperatorError(
            f"diffusion.worst_rung: {part}the {card.memory_bytes / 1e9:.1f} GB of {card.name} hold no image of "
            f"{model.name} down to the rung {own.worst_rung}; allow a lower one, or take a larger card",
            "diffusion.worst_rung",
        )
    held = placement.max_pixels if own.max_pixels is not None else min(made.max_pixels, placement.max_pixels)
    return replace(
        placement,
        max_pixels=held,
        smaller=placement.smaller if placement.smaller < held else 0,
        rung=made.rung,
        plan=made,
        memory_bytes=int(card.memory_bytes * share),
        shape=shape,
    )


def tell_plan(placement: Placement) -> None:
    """One line in the log of what this replica was planned to do, and one more where that is less than was wanted."""
    made = placement.plan
    if made is not None:
        wide, high = held_size(1, 1, placement.max_pixels)
        log.info(
            "%s on %.1f GB: %s, %.1f GB planned, largest image %d x %d",
            placement.model,
            placement.memory_bytes / 1e9,
            made.rung,
            made.footprint.peak / 1e9,
            wide,
            high,
        )
        if not made.fits:
            _warn(placement, made)


def _warn(placement: Placement, made: Plan) -> None:
    told = "draws it on the CPU" if not MEANS[made.rung].on_card else f"holds {made.max_pixels} pixels"
    log.warning(
        "%s on %.1f GB: no rung down to %s has room for an image of %d x %d; %s %s",
        placement.model,
        placement.memory_bytes / 1e9,
        placement.settings.worst_rung,
        made.width,
        made.height,
        made.rung,
        told,
    )


def card_use(placement: Placement) -> CardUse | None:
    """What this process takes of its card now; None where it computes on none."""
    usage, made = gpu_usage(), placement.plan
    if usage is None:
        return None
    planned = None if made is None else made.footprint.peak
    return CardUse(allowed=usage.allowed, used=usage.allocated, peak=usage.peak, planned=planned)
