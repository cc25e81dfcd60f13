"""What one machine has for everything that is to run on it: which setting is at fault where it is not enough."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from serve.encoders.registry import Encoder
from serve.errors import OperatorError
from serve.placements import Placement, setting_of
from serve.settings.tree import Settings

RESOURCES = (("GPU", "num_gpus"), ("CPU", "num_cpus"))
"""Of Ray, and the settings that reserve them."""
EPSILON = 1e-6
"""Sums of fractions of a GPU are off by less."""


def fit(
    settings: Settings, encoders: Sequence[Encoder], placements: Sequence[Placement], machine: Mapping[str, float]
) -> Settings:
    """The settings on a machine with these Ray resources: what the text encoders and the placements with a share of
    their own leave of its GPUs is shared out among the other diffusion replicas. A pool that sleeps counts as one
    replica: one day somebody wakes it. Of diffusion replicas the most count, for which there must be room.

    Raises OperatorError for more than there is: Ray would wait for another machine.
    """
    for resource, field in RESOURCES:
        if (wanted := _captions(settings, field)) > machine.get(resource, 0.0) + EPSILON:
            raise _too_much(f"captions.{field}", f"it wants {wanted:g}", resource, machine)
    for (resource, field), encoder in itertools.product(RESOURCES, encoders):
        if (wanted := _reserved(encoder, field)) > machine.get(resource, 0.0) + EPSILON:
            raise _too_much(f"encoders.{encoder.name}.{field}", f"it wants {wanted:g}", resource, machine)
    shared = _shared_out(settings, encoders, placements, machine)
    for resource, field in RESOURCES:
        http = settings.http.replicas * getattr(settings.http, field, 0.0)
        text = sum(_reserved(encoder, field) for encoder in encoders)
        drawing = {}
        for each in placements:
            own = shared.placement_named(each.name)
            drawing[each.name] = own.most_replicas * getattr(own, field)
        captions = _captions(settings, field)
        wants = [(f"http.{field}", http), (f"encoder.{field}", text), (f"captions.{field}", captions)]
        wants += [(setting_of(settings, name, field), wanted) for name, wanted in drawing.items()]
        said = f", captions {captions:g}" if settings.captions.source else ""
        told = f"http wants {http:g}, the text encoders {text:g}{said}, diffusion {sum(drawing.values()):g}"
        for (setting, _), wanted in zip(wants, itertools.accumulate(wanted for _, wanted in wants), strict=True):
            if wanted > machine.get(resource, 0.0) + EPSILON:
                raise _too_much(setting, told, resource, machine)
    return shared


def _shared_out(
    settings: Settings, encoders: Sequence[Encoder], placements: Sequence[Placement], machine: Mapping[str, float]
) -> Settings:
    """The settings, with a share of a GPU for every placement that may use one and names none."""
    if not machine.get("GPU"):
        return settings
    open_ = [each for each in placements if not each.settings.num_gpus and each.settings.device in ("auto", "cuda")]
    if not open_:
        return settings
    pieces = [("encoder.num_gpus", each.settings.num_gpus) for each in encoders for _ in range(_least(each))]
    if settings.captions.source and settings.captions.num_gpus:
        pieces += [("captions.num_gpus", settings.captions.num_gpus)] * max(1, settings.captions.min_replicas)
    for each in placements:
        if each.settings.num_gpus:
            setting = setting_of(settings, each.name, "num_gpus")
            pieces += [(setting, each.settings.num_gpus)] * each.settings.most_replicas
    share = _share(machine, pieces, sum(each.settings.most_replicas for each in open_))
    if not settings.placements:
        return settings.model_copy(update={"diffusion": settings.diffusion.model_copy(update={"num_gpus": share})})
    tables = dict(settings.placements)
    for each in open_:
        tables[each.name] = {**tables[each.name], "num_gpus": share}
    return settings.model_copy(update={"placements": tables})


def _share(machine: Mapping[str, float], pieces: Sequence[tuple[str, float]], replicas: int) -> float:
    """The largest share of one GPU that so many diffusion replicas can have beside the `pieces`, (setting, GPUs) each.

    Raises OperatorError naming the setting of the piece that finds no place, or of what leaves none.
    """
    free = [1.0] * int(machine["GPU"])
    told = f"{sum(wanted for _, wanted in pieces):g} of them are spoken for"
    for setting, wanted in sorted(pieces, key=lambda piece: piece[1], reverse=True):
        for part in [1.0] * int(wanted) + [wanted % 1] * (wanted % 1 > 0):
            fits = [card for card, left in enumerate(free) if left >= part - EPSILON]
            if not fits:
                raise _too_much(setting, told, "GPU", machine)
            free[min(fits, key=free.__getitem__)] -= part
    shares = sorted({left / count for left in free for count in range(1, replicas + 1)}, reverse=True)
    for share in (math.floor(1e4 * share) / 1e4 for share in shares):  # Ray counts in ten-thousandths
        if share > 0 and sum(int(left / share + EPSILON) for left in free) >= replicas:
            return share
    setting, _ = max(pieces, key=lambda piece: piece[1], default=("diffusion.replicas", 0.0))
    raise _too_much(setting, f"{told}, none is left to {replicas} diffusion replicas", "GPU", machine)


def _least(encoder: Encoder) -> int:
    return max(1, encoder.settings.min_replicas)


def _reserved(encoder: Encoder, field: str) -> float:
    """What the fewest replicas that a pool has when it is awake reserve, in `num_gpus` or `num_cpus`."""
    reserved: float = _least(encoder) * getattr(encoder.settings, field)
    return reserved


def _captions(settings: Settings, field: str) -> float:
    """The same of the pool that describes pictures; 0 where there is none."""
    own = settings.captions
    reserved: float = max(1, own.min_replicas) * getattr(own, field) if own.source else 0.0
    return reserved


def _too_much(setting: str, told: str, resource: str, machine: Mapping[str, float]) -> OperatorError:
    present = machine.get(resource, 0.0)
    return OperatorError(f"{setting}: {told}, and this machine has {present:g} {resource}s", setting)
