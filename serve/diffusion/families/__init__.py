"""The model families: each a small class that knows how its denoiser is called."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from serve.models import ModelFolder
from serve.rungs import Rung
from serve.settings.pools import DiffusionSettings

if TYPE_CHECKING:
    from serve.diffusion.families.base import Family

log = logging.getLogger(__name__)

FAMILIES = {
    "sd": "unet.SdFamily",
    "sdxl": "unet.SdxlFamily",
    "sdxl_refiner": "unet.SdxlFamily",
    "sd3": "sd3.Sd3Family",
    "flux": "flux.FluxFamily",
    "pixart": "pixart.PixArtFamily",
    "auraflow": "auraflow.AuraFlowFamily",
}
"""`ModelFolder.family` -> module and class in this package. Imported when asked for: diffusers' models are slow to."""


def family_class(family: str) -> type[Family]:
    """By its name."""
    module, _, name = FAMILIES[family].partition(".")
    found: type[Family] = getattr(import_module(f"{__name__}.{module}"), name)
    return found


def open_family(
    model: ModelFolder,
    device: torch.device,
    dtype: torch.dtype,
    settings: DiffusionSettings,
    rung: Rung = Rung.RESIDENT,
) -> Family:
    """The model's denoiser and VAE for `device`, on a rung of the memory ladder, as the placement's speed options want
    them. Where the two can't both be had, memory goes before speed.

    Raises OperatorError naming `model.source`, `diffusion.tiny_vae`, `diffusion.rung` or `diffusion.compile`.
    """
    family = family_class(model.family)(model, device, dtype, settings, rung)
    if settings.compile:
        from serve.diffusion.families.speed import compile_family
        from serve.diffusion.rungs import compiles

        if compiles(rung):
            compile_family(family)
        else:
            log.warning("diffusion.compile: model %s is not compiled on the rung %s", model.name, rung)
    return family
