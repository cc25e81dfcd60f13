"""Small VAEs at their worst, and something to give them."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from support.image_models import vae

CPU = torch.device("cpu")


def noise(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pixels_of(height: int = 24, width: int = 40) -> torch.Tensor:
    return noise(1, 3, height, width).tanh()


def overflowing(dtype: torch.dtype, **options: Any) -> AutoencoderKL:
    """The first activation is too large for float16; the norm after it brings it back where the range holds it."""
    model = vae(0, **options).eval().requires_grad_(False)
    model.decoder.conv_in.weight.data *= 1e5
    return torch.nn.Module.to(model, dtype)
