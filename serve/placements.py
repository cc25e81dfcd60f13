"""Which model is drawn where, and how large an image each place holds. Plain arithmetic: no torch, no Ray."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from serve.errors import InvalidRequest, OperatorError
from serve.models import ModelFolder
from serve.models.denoiser import Denoiser, best_dtype
from serve.origins import reason_of
from serve.settings import DiffusionSettings, Settings

GPU_CLASS_LABEL = "tandem.dev/gpu-class"
"""The node label that says which GPU class a node's cards are of."""
HERE = "this-machine"
"""Its value on the one node of `tandem up`: every placement is to run there, whichever classes there are."""
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Of one number, by dtype."""
USABLE = 0.9
"""Share of a card's memory that weights and images may take: the rest is CUDA's context, cuDNN's workspaces and what
the allocator can't join."""
LANES = 2
"""Batch entries of one image with guidance, the least that must fit."""
STEP_TENSORS = 32
"""Tensors as wide as the denoiser's first block that one entry of a step has alive at its peak: U-Net skips, the hidden
layers of feed-forwards, queries, keys and values. Counted: 26 in SD 1.5, 20 in FLUX, 16 in SDXL, 14 in SD 3; what is
above the most of these is the margin for what a count can't see, until cards are measured."""
DECODE_TENSORS = 6
"""Tensors as wide as the VAE's last block that a decoding has alive at its peak: three of the twice as wide block
before it, at full size."""
DECODE_TILE_PIXELS = 1024 * 1024
"""The VAE decodes an image of up to so many pixels whole, and a larger one in tiles of as many."""
GRID = 16
"""Pixels; every family's sizes are multiples of it or may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One model on one kind of GPU. `name` is unique here and fit for a deployment's name.

    `settings` are `diffusion` with what the placement says over it. `gpu_class` is None where it runs on any node.
    `max_pixels` is the largest image that it holds; `smaller` the largest that another placement of the same model
    holds which holds less, 0 where there is none: work above it must be drawn here.
    """

    name: str
    model: str
    gpu_class: str | None
    settings: DiffusionSettings
    max_pixels: int
    smaller: int = 0


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
        """Raises InvalidRequest naming `width`, which says the largest size, where no placement holds the image."""
        most = self.max_pixels(model)
        if width * height > most:
            wide, high = held_size(width, height, most)
            raise InvalidRequest(
                f"{width} x {height} is {width * height} pixels; the GPUs that draw {model} here hold {most}, "
                f"such as {wide} x {high}",
                "width",
            )

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
        return settings.diffusion.replicas > 0
    return any(settings.placement_named(name).replicas for name in settings.placements)


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


def bytes_per_pixel(denoiser: Denoiser, dtype: str) -> tuple[float, float]:
    """What each pixel of an image is estimated to take while it is stepped and while it is decoded, in bytes.

    A step holds STEP_TENSORS x denoiser_width numbers for each latent (for each patch of latents, where the model reads
    patches, which the grid of its sizes shows) and lane. A decoding holds DECODE_TENSORS x vae_width numbers for each
    pixel of a tile, in float32 because one that overflows is repeated in it.
    """
    step = LANES * STEP_TENSORS * denoiser.denoiser_width * BYTES[dtype] / denoiser.size_multiple**2
    return step, float(DECODE_TENSORS * denoiser.vae_width * BYTES["float32"])


def estimated_pixels(denoiser: Denoiser, dtype: str, memory_bytes: float) -> int:
    """The largest image that so much memory holds beside the weights; 0 or less where not even they fit.

    While an image is stepped, another one of its size may be decoded: pixels p with
    step x p + decode x min(p, DECODE_TILE_PIXELS) <= USABLE x memory - weights. An estimate from counts of parameters
    and channels, to be replaced by measurements of each model on each card.
    """
    step, decode = bytes_per_pixel(denoiser, dtype)
    free = USABLE * memory_bytes - denoiser.parameters * BYTES[dtype]
    whole = free / (step + decode)
    return math.floor(whole if whole <= DECODE_TILE_PIXELS else (free - decode * DECODE_TILE_PIXELS) / step)


def _settled(settings: Settings, drawn: Mapping[str, ModelFolder]) -> Iterable[Placement]:
    for name in settings.placements:
        try:
            own = settings.placement_named(name)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            place = ".".join(("placements", name, *map(str, fault["loc"])))
            raise OperatorError(f"{place}: {reason_of(fault)}", place) from None
        model = own.model or next(iter(drawn), None)
        if own.replicas and model not in drawn:
            place = setting_of(settings, name, "model")
            raise OperatorError(f"{place}: {model} is not drawn here; there are {_listed(drawn)}", place)
        if own.replicas and model is not None:
            yield _placed(settings, name, own, drawn[model])


def _one_each(settings: Settings, drawn: Mapping[str, ModelFolder]) -> Iterable[Placement]:
    own = settings.diffusion
    if not own.replicas:
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
    assert model.denoiser is not None  # models that are drawn have one
    return Placement(
        name=name,
        model=model.name,
        gpu_class=own.gpu_class,
        settings=own.model_copy(update={"model": model.name}),
        max_pixels=_held(settings, name, own, model, model.denoiser),
    )


def _held(settings: Settings, name: str, own: DiffusionSettings, model: ModelFolder, denoiser: Denoiser) -> int:
    """`max_pixels`: what the settings say, else what the class is estimated to hold, else what the limits let in."""
    least, most = denoiser.size_multiple**2, settings.limits.max_side**2
    if own.max_pixels is not None:
        if own.max_pixels < least:
            place = setting_of(settings, name, "max_pixels")
            raise OperatorError(f"{place}: the smallest image of {model.name} has {least} pixels", place)
        return min(own.max_pixels, most)
    if own.gpu_class is None:
        return most
    place = setting_of(settings, name, "gpu_class")
    gpu = settings.gpu_classes.get(own.gpu_class)
    if gpu is None:
        known = _listed(settings.gpu_classes) or "none"
        raise OperatorError(f"{place}: there is no GPU class {own.gpu_class}; gpu_classes has {known}", place)
    best = "float32" if own.device == "cpu" else best_dtype(model.family, gpu.dtypes)
    dtype = best if own.dtype == "auto" else own.dtype
    share = own.num_gpus if 0 < own.num_gpus < 1 else 1.0
    pixels = estimated_pixels(denoiser, dtype, gpu.memory_gb * 1e9 * share)
    if pixels < least:
        part = "" if share == 1 else f"{share:g} of "
        weights = denoiser.parameters * BYTES[dtype] / 1e9
        raise OperatorError(
            f"{place}: {part}{gpu.memory_gb:g} GB hold no image of {model.name} beside its {weights:.1f} GB of weights "
            f"in {dtype}",
            place,
        )
    return min(pixels, most)


def _next_smaller(placement: Placement, placements: Sequence[Placement]) -> int:
    others = (each.max_pixels for each in placements if each.model == placement.model)
    return max((pixels for pixels in others if pixels < placement.max_pixels), default=0)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
