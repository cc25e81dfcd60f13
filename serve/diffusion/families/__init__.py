"""The model families: each a small class that knows how its denoiser is called."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import torch

from serve.models import ModelFolder
from serve.settings import DiffusionSettings

if TYPE_CHECKING:
    from serve.diffusion.families.base import Family

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


def open_family(model: ModelFolder, device: torch.device, dtype: torch.dtype, settings: DiffusionSettings) -> Family:
    """The model's denoiser and VAE on `device`, as the placement's speed options want them.

    Raises OperatorError naming `model.source`, `diffusion.tiny_vae` or `diffusion.compile`.
    """
    module, _, name = FAMILIES[model.family].partition(".")
    family: Family = getattr(import_module(f"{__name__}.{module}"), name)(model, device, dtype, settings)
    if settings.compile:
        from serve.diffusion.families.speed import compile_family

        compile_family(family)
    return family
