"""The GPU classes that are declared, the cards that are here, and what the memory plan makes of both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec

from serve.doctor.findings import Finding, fault, ok, refused, warning
from serve.errors import OperatorError
from serve.memory.cards import Found, NoDriver, cards_here
from serve.memory.planner import Plan
from serve.models import ModelFolder
from serve.placements import Placement, held_size, plan_placements, setting_of, wanted_models
from serve.rungs import Rung
from serve.settings.pools import DiffusionSettings, GpuClassSettings
from serve.settings.tree import Settings

_PLAN = "`tandem plan --detail` shows every rung; a larger card, a smaller diffusion.max_pixels, or another model"
_LARGER = 1.25
"""How many times a class's memory a card may have and still count as one of it: cards come in steps of half as much
again, and their sellers count in 1024s."""


def check_gpus(settings: Settings, models: Mapping[str, ModelFolder]) -> list[Finding]:
    """On a cluster, of the node that this runs on."""
    drawn = {name: model for name, model in models.items() if model.denoiser is not None}
    found: list[Finding] = []
    placements: Sequence[Placement] = ()
    if len(models) < len(wanted_models(settings)):
        told, cure = "not every model is here and whole, so that nothing is planned", "mend what is said of the models"
        found.append(warning("plan-unknown", "placements", told, cure))
    elif drawn:
        try:
            placements = plan_placements(settings, drawn)
        except OperatorError as error:
            found.append(refused("placement", error, _PLAN))
    cards = _cards(found, wanted=_wants_cards(settings))
    if cards and placements:
        placements = _on_this_machine(settings, drawn, placements, cards, found)
    if any(each.device != "cpu" for each in _drawing(settings)):
        found += _torch(cards)
    found += _classes(settings, cards)
    for placement in placements:
        found += _placement(settings, placement, drawn[placement.model], cards)
    return found


def _cards(found: list[Finding], *, wanted: bool) -> Sequence[Found]:
    try:
        cards = cards_here()
    except NoDriver as error:
        if wanted:
            cure = "install NVIDIA's driver, or run this on a node that has the cards"
            found.append(warning("no-cards", "diffusion.num_gpus", f"GPUs are asked for, and {error.message}", cure))
        else:
            found.append(ok("no-cards", "diffusion.device", f"{error.message}: images are drawn on the CPU"))
        return ()
    except OperatorError as error:
        cure = "mend the driver until nvidia-smi shows the cards; in a container, give it the GPUs"
        found.append(fault("driver", "diffusion.device", error.message, cure))
        return ()
    for card in cards:
        told = f"{card.number} x {card.name}, {card.memory_bytes / 1e9:.1f} GB, {', '.join(card.dtypes)}"
        found.append(ok("cards", "diffusion.device", told))
    return cards


def _on_this_machine(
    settings: Settings,
    drawn: Mapping[str, ModelFolder],
    placements: Sequence[Placement],
    cards: Sequence[Found],
    found: list[Finding],
) -> Sequence[Placement]:
    """The placements with the shares of these cards that `tandem up` would give to those that name none; what the text
    encoders reserve of them is left out, because their weights would have to be read for it."""
    from serve.shares import fit  # brings torch

    number = float(sum(card.number for card in cards))
    try:
        return plan_placements(fit(settings, (), placements, {"GPU": number, "CPU": math.inf}), drawn)
    except OperatorError as error:
        setting = error.param or "diffusion.num_gpus"
        told = error.message.removeprefix(f"{setting}: ")
        cure = "fewer replicas or smaller shares; on a cluster the other nodes' cards count as well"
        found.append(warning("gpus-short", setting, told, cure))
        return placements


def _drawing(settings: Settings) -> list[DiffusionSettings]:
    """Those with replicas, whether their models are here or not."""
    own = [settings.placement_named(name) for name in settings.placements] or [settings.diffusion]
    return [each for each in own if each.most_replicas]


def _wants_cards(settings: Settings) -> bool:
    own = _drawing(settings)
    return any(each.num_gpus or each.device == "cuda" or (each.gpu_class and each.device != "cpu") for each in own)


def _torch(cards: Sequence[Found]) -> Iterator[Finding]:
    if not cards:
        return
    from serve.devices import best_device  # brings torch

    if best_device() != "cuda":
        told = "torch finds no CUDA, although the driver shows cards: it is a CPU build, or newer than the driver"
        cure = "install torch's CUDA build, or a newer driver; unset CUDA_VISIBLE_DEVICES where that hides the cards"
        yield fault("torch-cuda", "diffusion.device", told, cure)


def _classes(settings: Settings, cards: Sequence[Found]) -> Iterator[Finding]:
    used = {each.gpu_class for each in _drawing(settings)}
    used |= {settings.encoder.gpu_class, *(each.get("gpu_class") for each in settings.encoders.values())}
    used.add(settings.captions.gpu_class)
    for name, declared in settings.gpu_classes.items():
        yield from _class(name, declared, cards, used=name in used)
    if not settings.gpu_classes:
        return
    for card in cards:
        if not any(_is_of(card, each) for each in settings.gpu_classes.values()):
            told = f"no class is like the {card.name} here, {card.memory_bytes / 1e9:.1f} GB"
            cure = "declare one, or the card draws less than it could"
            yield warning("card-without-class", "gpu_classes", told, cure)


def _class(name: str, declared: GpuClassSettings, cards: Sequence[Found], *, used: bool) -> Iterator[Finding]:
    setting = f"gpu_classes.{name}"
    if not used:
        told = "no placement and no encoder is on it"
        yield warning("class-unused", setting, told, f"name it in a placement's gpu_class, or leave {name} out")
        return
    if not cards:
        return  # told once by `no-cards`
    same = [card for card in cards if _is_of(card, declared)]
    if not same:
        here = ", ".join(f"{card.name} ({card.memory_bytes / 1e9:.1f} GB)" for card in cards)
        told = f"it has {declared.memory_gb:g} GB; here are {here}"
        cure = "declare the memory that nvidia-smi shows; on a cluster, run this on a node of the class"
        yield warning("class-without-card", setting, told, cure)
    for card in same:
        if lacking := [dtype for dtype in declared.dtypes if dtype not in card.dtypes]:
            told = f"the {card.name} here does not compute in {', '.join(lacking)}"
            yield fault("class-dtypes", f"{setting}.dtypes", told, f"dtypes: [{', '.join(card.dtypes)}]")
        else:
            yield ok("class", setting, f"{declared.memory_gb:g} GB: {card.number} x {card.name} here")


def _is_of(card: Found, declared: GpuClassSettings) -> bool:
    from serve.devices import CLASS_SLACK

    class_bytes = declared.memory_gb * 1e9
    return CLASS_SLACK * class_bytes <= card.memory_bytes <= _LARGER * class_bytes


def _placement(
    settings: Settings, placement: Placement, model: ModelFolder, cards: Sequence[Found]
) -> Iterator[Finding]:
    own, name = placement.settings, placement.name
    if placement.gpu_class is not None:
        if not settings.placement_named(name).num_gpus and own.device in ("auto", "cuda"):
            setting = setting_of(settings, name, "num_gpus")
            told = f"it is 0, and {placement.gpu_class} is a class of GPUs: a cluster refuses that"
            yield warning("placement-no-gpu", setting, told, "say 1, or which share of a card; `tandem up` shares out")
        yield from _planned(settings, placement, placement.gpu_class)
        return
    if not cards or own.device not in ("auto", "cuda"):
        return
    from serve.devices import Card  # brings torch
    from serve.replica_plan import planned_here

    for card in cards:
        try:
            made = planned_here(placement, model, Card(card.name, card.memory_bytes, card.dtypes))
        except OperatorError as error:
            yield refused("plan-no-rung", error, _PLAN)
            continue
        yield from _planned(settings, made, card.name)


def _planned(settings: Settings, placement: Placement, where: str) -> Iterator[Finding]:
    made = placement.plan
    if made is None:
        return
    setting = setting_of(settings, placement.name, "gpu_class" if placement.gpu_class else "rung")
    told = f"{placement.model} on {where}: {_told(made)}"
    if not made.fits:
        yield warning("plan-not-fitting", setting, f"{told}, which no allowed rung holds", _PLAN)
        return
    if made.rung in (Rung.INT8, Rung.INT4) and find_spec("bitsandbytes") is None:
        cure = "pip install 'tandem-serve[quantization]', else the replica takes a slower rung"
        yield warning("plan-no-bitsandbytes", setting, f"{told}; bitsandbytes is not installed", cure)
        return
    wide, high = held_size(1, 1, placement.max_pixels)
    yield ok("plan", setting, f"{told}, up to {wide} x {high}")


def _told(made: Plan) -> str:
    return (
        f"{made.rung} in {made.dtype}, {made.footprint.peak / 1e9:.1f} of {made.budget / 1e9:.1f} GB "
        f"for {made.width} x {made.height}"
    )
