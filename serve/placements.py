"""Which model is drawn where, and how large an image each place holds. Plain arithmetic: no torch, no Ray."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import ValidationError

from serve.errors import InvalidRequest, OperatorError
from serve.memory.planner import Plan, plan, smallest_class
from serve.memory.shapes import shape_of
from serve.memory.terms import Dtype, ModelShape
from serve.models import ModelFolder
from serve.origins import reason_of
from serve.rungs import Rung, worst_of
from serve.settings.pools import DiffusionSettings, GpuClassSettings, ModelSettings
from serve.settings.tree import Settings

GPU_CLASS_LABEL = "tandem.dev/gpu-class"
"""The node label that says which GPU class a node's cards are of."""
HERE = "this-machine"
"""Its value on the one node of `tandem up`: every placement is to run there, whichever classes there are."""
GRID = 16
"""Pixels; every family's sizes are multiples of it or may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One model on one kind of GPU. `name` is unique here and fit for a deployment's name.

    `settings` are `diffusion` with what the placement says over it. `gpu_class` is None where it runs on any node.
    `max_pixels` is the largest image that it holds; `smaller` the largest that another placement of the same model
    holds which holds less, 0 where there is none: work above it must be drawn here.

    `rung` is where its replicas begin on the memory ladder, by `plan`, which is made for a share of `memory_bytes` of a
    card of the class. Without a class that is not known here: each replica plans by the card that it finds.
    """

    name: str
    model: str
    gpu_class: str | None
    settings: DiffusionSettings
    max_pixels: int
    smaller: int = 0
    rung: Rung = Rung.RESIDENT
    plan: Plan | None = None
    memory_bytes: int = 0
    shape: ModelShape | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Fleet:
    """All placements, as the door sees them: what can be drawn at all. A job may go to any placement that holds it."""

    placements: tuple[Placement, ...]

    def for_model(self, model: str) -> tuple[Placement, ...]:
        return tuple(each for each in self.placements if each.model == model)

    def max_pixels(self, model: str) -> int:
        """The largest image of this model that anybody holds; 0 where nobody draws it."""
        return max((each.max_pixels for each in self.for_model(model)), default=0)

    def tiny_vae(self, model: str) -> bool:
        """Whether an order may ask for it: every placement of the model must have it, the job goes to any."""
        return self._all(each.settings.tiny_vae is not None for each in self.for_model(model))

    def step_cache(self, model: str) -> bool:
        """As `tiny_vae`."""
        return self._all(each.settings.step_cache for each in self.for_model(model))

    def check(self, model: str, width: int, height: int) -> None:
        """Raises InvalidRequest naming `width`, which says the largest size, where no placement holds the image; and
        the smallest built-in GPU class that would, where it is larger than those."""
        most = self.max_pixels(model)
        if width * height > most:
            wide, high = held_size(width, height, most)
            raise InvalidRequest(
                f"{width} x {height} is {width * height} pixels; the GPUs that draw {model} here hold {most}, "
                f"such as {wide} x {high}{self._larger_card(model, width, height)}",
                "width",
            )

    def _larger_card(self, model: str, width: int, height: int) -> str:
        """The end of a refusal; empty where no card is known, or memory is not what is short."""
        planned = [each for each in self.for_model(model) if each.plan is not None]
        if not planned or planned[0].shape is None:
            return ""
        worst = worst_of(Rung(each.settings.worst_rung) for each in planned)
        gpu = smallest_class(planned[0].shape, width, height, worst=worst, dtype=planned[0].settings.fixed_dtype)
        if gpu is None or gpu.memory_bytes <= max(each.memory_bytes for each in planned):
            return ""
        return f"; a GPU of {gpu.memory_gb:g} GB would hold it"

    @staticmethod
    def _all(answers: Iterable[bool]) -> bool:
        given = list(answers)
        return bool(given) and all(given)


def plan_placements(settings: Settings, drawn: Mapping[str, ModelFolder]) -> tuple[Placement, ...]:
    """The placements of the models that are drawn, by name: those of the settings, or one for each model, named after
    it. A placement without replicas is left out.

    Raises OperatorError that names `placements.<name>.<field>`, or `diffusion.<field>` where the value is set there:
    an unknown model or GPU class, a wrong field, a class that holds the model at no size; and one that names
    `placements` where a model is drawn nowhere.
    """
    found = tuple(_settled(settings, drawn) if settings.placements else _one_each(settings, drawn))
    idle = [name for name in drawn if all(each.model != name for each in found)]
    if found and idle:
        raise OperatorError(f"placements: none has replicas for the model {idle[0]}", "placements")
    return tuple(replace(each, smaller=_next_smaller(each, found)) for each in found)


def draws(settings: Settings) -> bool:
    """Whether there is any diffusion replica: without one this server only encodes text. Raises ValidationError."""
    if not settings.placements:
        return settings.diffusion.most_replicas > 0
    return any(settings.placement_named(name).most_replicas for name in settings.placements)


def wanted_models(settings: Settings) -> list[tuple[str, ModelSettings, bool]]:
    """(group of settings, what it says of a model, whether only its text is wanted). Raises ValidationError."""
    text_only = not draws(settings)
    wanted = [("model", settings.model, text_only)]
    wanted += [(f"models.{index}", each, text_only) for index, each in enumerate(settings.models)]
    return wanted + [(f"text_models.{index}", each, True) for index, each in enumerate(settings.text_models)]


def setting_of(settings: Settings, placement: str, field: str) -> str:
    """The dotted name under which a field of a placement's settings is set."""
    return (
        f"placements.{placement}.{field}" if field in settings.placements.get(placement, {}) else f"diffusion.{field}"
    )


def held_size(width: int, height: int, pixels: int) -> tuple[int, int]:
    """A size like width x height, on the grid, of no more than `pixels`."""
    grid = GRID if pixels >= GRID * GRID else 1
    short = min(width, height)
    scale = math.sqrt(pixels / (width * height))
    side = max(grid, math.floor(short * scale / grid) * grid)
    other = max(grid, min(math.floor(max(width, height) * scale), pixels // side) // grid * grid)
    return (side, other) if width <= height else (other, side)


def plan_share(
    own: DiffusionSettings, shape: ModelShape, memory_bytes: float, dtypes: Sequence[Dtype], most_pixels: int
) -> Plan:
    """The plan of a replica with these settings on so much of a card, for the model's own size; for the largest that is
    drawn there, where the settings say it or less than the model's own size is let in (`most_pixels`)."""
    width, height = shape.default_width, shape.default_height
    if own.max_pixels is not None or width * height > most_pixels:
        width, height = held_size(width, height, min(own.max_pixels or most_pixels, most_pixels))
    return plan(
        shape,
        memory_bytes,
        ("float32",) if own.device == "cpu" else dtypes,
        width=width,
        height=height,
        dtype=own.fixed_dtype,
        best=own.best_rung,
        worst=Rung(own.worst_rung),
    )


def share_of(own: DiffusionSettings) -> float:
    """Of a card's memory, what one replica with these settings may take."""
    return own.num_gpus if 0 < own.num_gpus < 1 else 1.0


def _settled(settings: Settings, drawn: Mapping[str, ModelFolder]) -> Iterable[Placement]:
    for name in settings.placements:
        try:
            own = settings.placement_named(name)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            place = ".".join(("placements", name, *map(str, fault["loc"])))
            raise OperatorError(f"{place}: {reason_of(fault)}", place) from None
        model = own.model or next(iter(drawn), None)
        if own.most_replicas and model not in drawn:
            place = setting_of(settings, name, "model")
            raise OperatorError(f"{place}: {model} is not drawn here; there are {_listed(drawn)}", place)
        if own.most_replicas and model is not None:
            yield _placed(settings, name, own, drawn[model])


def _one_each(settings: Settings, drawn: Mapping[str, ModelFolder]) -> Iterable[Placement]:
    own = settings.diffusion
    if not own.most_replicas:
        return
    if own.model is not None and own.model not in drawn:
        place = "diffusion.model"
        raise OperatorError(f"{place}: {own.model} is not drawn here; there are {_listed(drawn)}", place)
    if own.model is not None and len(drawn) > 1:
        raise OperatorError(
            "diffusion.model: without placements every model is drawn; say in `placements` what is drawn where",
            "diffusion.model",
        )
    names = {name: re.sub(r"[^A-Za-z0-9._-]+", "-", name) for name in drawn}
    clash = len(set(names.values())) < len(names)
    for index, (name, model) in enumerate(drawn.items()):
        yield _placed(settings, f"{names[name]}-{index}" if clash else names[name], own, model)


def _placed(settings: Settings, name: str, own: DiffusionSettings, model: ModelFolder) -> Placement:
    most = _most_pixels(settings, name, own, model)
    place = Placement(
        name=name,
        model=model.name,
        gpu_class=own.gpu_class,
        settings=own.model_copy(update={"model": model.name}),
        max_pixels=most,
        rung=own.best_rung,
    )
    gpu = _gpu_class(settings, name, own)
    if gpu is None:
        return place
    shape, memory = shape_of(model), gpu.memory_gb * 1e9 * share_of(own)
    made = plan_share(own, shape, memory, gpu.dtypes, most)
    held = most if own.max_pixels is not None else min(made.max_pixels, most)
    if made.max_pixels < shape.size_multiple**2:  # also where the settings say how large images may be
        raise _too_small(settings, name, own, gpu, shape, made)
    return replace(place, max_pixels=held, rung=made.rung, plan=made, memory_bytes=int(memory), shape=shape)


def _most_pixels(settings: Settings, name: str, own: DiffusionSettings, model: ModelFolder) -> int:
    """What the settings let in, whatever a card holds."""
    most = settings.limits.max_side**2
    if own.max_pixels is None:
        return most
    assert model.denoiser is not None  # models that are drawn have one
    least = model.denoiser.size_multiple**2
    if own.max_pixels < least:
        place = setting_of(settings, name, "max_pixels")
        raise OperatorError(f"{place}: the smallest image of {model.name} has {least} pixels", place)
    return min(own.max_pixels, most)


def _gpu_class(settings: Settings, name: str, own: DiffusionSettings) -> GpuClassSettings | None:
    if own.gpu_class is None:
        return None
    gpu = settings.gpu_classes.get(own.gpu_class)
    if gpu is None:
        place = setting_of(settings, name, "gpu_class")
        known = _listed(settings.gpu_classes) or "none"
        raise OperatorError(f"{place}: there is no GPU class {own.gpu_class}; gpu_classes has {known}", place)
    return gpu


def _too_small(
    settings: Settings, name: str, own: DiffusionSettings, gpu: GpuClassSettings, shape: ModelShape, made: Plan
) -> OperatorError:
    """For a class that holds the model at no size."""
    place, share = setting_of(settings, name, "gpu_class"), share_of(own)
    part = "" if share == 1 else f"{share:g} of "
    text = (
        f"{place}: {part}{gpu.memory_gb:g} GB hold no image of {shape.name} beside its "
        f"{made.footprint.weights / 1e9:.1f} GB of weights in {made.dtype}, not even on the rung {made.rung}"
    )
    larger = smallest_class(shape, made.width, made.height, worst=made.rung, dtype=own.fixed_dtype)
    if larger is not None and larger.memory_bytes > gpu.memory_gb * 1e9 * share:
        text += f"; the smallest that would do has {larger.memory_gb:g} GB"
    return OperatorError(text, place)


def _next_smaller(placement: Placement, placements: Sequence[Placement]) -> int:
    others = (each.max_pixels for each in placements if each.model == placement.model)
    return max((pixels for pixels in others if pixels < placement.max_pixels), default=0)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
