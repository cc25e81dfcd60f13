"""Steps, guidance and strength of an order that names none: what the operator set, else the model's own file, else what
models of its kind are made for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve.models.denoiser import Guidance
from serve.models.weight_files import read_json, refused

GENERATION_CONFIG = "generation_config.json"
"""The name that the hub's libraries give such a file; only the fields of `Defaults` are read."""


@dataclass(frozen=True, slots=True)
class Defaults:
    num_inference_steps: int
    guidance_scale: float
    strength: float = 0.6


_FAMILIES: Mapping[str, Defaults] = {
    "sd": Defaults(25, 5.0, 0.8),
    "sdxl": Defaults(30, 5.0),
    "sdxl_refiner": Defaults(30, 5.0, 0.3),
    "sd3": Defaults(28, 4.5),
    "flux": Defaults(28, 3.5),
    "pixart": Defaults(20, 4.5),
    "auraflow": Defaults(50, 3.5),
}
_FLUX_SCHNELL = Defaults(4, 0.0)
_LATENT_CONSISTENCY = Defaults(4, 8.5)
_LATENT_CONSISTENCY_SAMPLER = Defaults(4, 1.0)
_DISTILLED_STEPS, _DISTILLED_GUIDANCE = 4, 0.0
_DISTILLED = re.compile(r"(?i:turbo|lightning)|(?i:hyper)(?![a-z])")
"""In the names of models that were distilled to few steps without guidance; a "hyperrealism" was not."""
_PLAYGROUND = Defaults(50, 3.0)


def defaults(folder: Path, name: str, family: str, guidance: Guidance, scheduler: Mapping[str, Any]) -> Defaults:
    """`name` is the source's (a folder's, a file's or a hub id's), `scheduler` the model's own sampler's configuration.
    Raises OperatorError where the file garbles a number."""
    return _from_file(folder / GENERATION_CONFIG, usual(name, family, guidance, scheduler))


def usual(name: str, family: str, guidance: Guidance, scheduler: Mapping[str, Any]) -> Defaults:
    """What models of that kind are made for.

    A distilled one is told by its denoiser's inputs or by the one sampler that it works with. Others (SDXL Lightning,
    SD 3.5 Turbo) have the configuration of what they were distilled from, and are told by their names.
    """
    sampler = str(scheduler.get("_class_name"))
    if guidance == "none":
        return _FLUX_SCHNELL
    if guidance == "embedded" and family != "flux":
        return _LATENT_CONSISTENCY
    if sampler == "LCMScheduler":
        return _LATENT_CONSISTENCY_SAMPLER
    if family == "sdxl" and sampler.startswith("EDM"):
        return _PLAYGROUND
    if guidance == "classifier_free" and (_DISTILLED.search(name) or _turbo(family, sampler, scheduler)):
        return replace(_FAMILIES[family], num_inference_steps=_DISTILLED_STEPS, guidance_scale=_DISTILLED_GUIDANCE)
    return _FAMILIES[family]


def _turbo(family: str, sampler: str, scheduler: Mapping[str, Any]) -> bool:
    """SD-Turbo and SDXL-Turbo. Fine-tunes on a schedule that ends in pure noise space their steps so too, but predict
    v."""
    own = {"sd": "EulerDiscreteScheduler", "sdxl": "EulerAncestralDiscreteScheduler"}.get(family)
    trailing = scheduler.get("timestep_spacing") == "trailing"
    return trailing and sampler == own and scheduler.get("prediction_type", "epsilon") == "epsilon"


def _from_file(file: Path, otherwise: Defaults) -> Defaults:
    if not file.is_file():
        return otherwise
    content = read_json(file)
    steps = content.get("num_inference_steps", otherwise.num_inference_steps)
    if type(steps) is not int or steps < 1:
        raise refused(f"{file}: num_inference_steps is {steps}, not a number of at least 1")
    return replace(
        otherwise,
        num_inference_steps=steps,
        guidance_scale=_within(file, content, "guidance_scale", otherwise.guidance_scale, 0.0, 1000.0),
        strength=_within(file, content, "strength", otherwise.strength, 0.01, 1.0),
    )


def _within(
    file: Path, content: Mapping[str, Any], field: str, otherwise: float, smallest: float, largest: float
) -> float:
    value = content.get(field, otherwise)
    # A comparison with NaN, which Python's JSON reads, is false.
    if type(value) not in (int, float) or not smallest <= value <= largest:
        raise refused(f"{file}: {field} is {value}, not a number from {smallest:g} to {largest:g}")
    return float(value)
