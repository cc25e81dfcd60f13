"""What latents look like, without a VAE: every pixel of a preview is a linear map of one latent."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image

from serve.diffusion.vae import Vae

MIN_SIDE = 64
"""Previews are enlarged until their shorter side has so many pixels."""
QUALITY = 85
_SIDE = 16
"""Latents on each side of a pattern."""


class PreviewMap:
    """Colour = W latent + c, with W (3, C) and c (3,) fitted by least squares to what the model's own VAE makes of
    synthetic pictures. Fitted at the first preview, which it delays; not thread-safe.

    Owns: W and c.
    """

    def __init__(self, vae: Vae) -> None:
        self._vae = vae
        self._map: torch.Tensor | None = None

    def jpeg(self, latents: torch.Tensor) -> bytes:
        """A JPEG file of latents (1, C, h, w), one pixel each. Latents that are not numbers are grey."""
        image = Image.fromarray(self.colours(latents))
        if (times := math.ceil(MIN_SIDE / min(image.size))) > 1:
            image = image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY)
        return file.getvalue()

    def colours(self, latents: torch.Tensor) -> np.ndarray:
        """(h, w, 3), uint8, RGB."""
        if self._map is None:
            self._map = self._fit()
        flat = latents[0].float().cpu().flatten(1)
        colours = (self._map[:, :-1] @ flat + self._map[:, -1:]).nan_to_num(0.5, 1.0, 0.0).clamp(0, 1)
        return (colours.T.reshape(*latents.shape[2:], 3) * 255).round().to(torch.uint8).numpy()

    def _fit(self) -> torch.Tensor:
        """(3, C + 1): the last column is c."""
        seen, wanted = [], []
        patterns = _patterns(_SIDE * self._vae.scale_factor)
        encoded = self._vae.encodings(2.0 * pixels.unsqueeze(0) - 1.0 for pixels in patterns)
        for pixels, moments in zip(patterns, encoded, strict=True):
            latents = moments.mode()[0].float().cpu().flatten(1)
            seen.append(torch.cat([latents, torch.ones(1, latents.shape[1])]))
            wanted.append(torch.nn.functional.avg_pool2d(pixels, self._vae.scale_factor).flatten(1))
        fitted: torch.Tensor = torch.linalg.lstsq(torch.cat(seen, 1).T, torch.cat(wanted, 1).T, driver="gelsd").solution
        return fitted.T


def _patterns(side: int) -> list[torch.Tensor]:
    """Pictures (3, side, side) in [0, 1], the same ones each time: the corners of the colour cube as stripes; greys and
    colours four to a picture; two colours that run into each other, with blobs of others on them; black and white,
    twice: as backgrounds they are common, and a tint shows on them most."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    stripes = corners.T.repeat_interleave(math.ceil(side / 8), dim=1)[:, :side]
    greys = torch.linspace(0, 1, 5).unsqueeze(1).expand(5, 3)
    plain = torch.cat([greys, torch.rand((15, 3), generator=generator)])
    quarters = plain.view(4, 5, 3).permute(1, 2, 0).reshape(5, 3, 2, 2)
    large = torch.nn.functional.interpolate(quarters, size=(side, side))
    return [
        stripes[:, :, None].expand(3, side, side).contiguous(),
        *large,
        *(_blobs(side, generator) for _ in range(6)),
        *(torch.full((3, side, side), grey) for grey in (0.0, 1.0, 0.0, 1.0)),
    ]


def _blobs(side: int, generator: torch.Generator) -> torch.Tensor:
    ramp = torch.linspace(0, 1, side)
    across, down = ramp.expand(side, side), ramp.unsqueeze(1).expand(side, side)
    first, second, *colours = torch.rand((6, 3), generator=generator).unsqueeze(-1).unsqueeze(-1)
    angle = torch.rand((), generator=generator) * math.tau
    way = ((across - 0.5) * angle.cos() + (down - 0.5) * angle.sin() + 0.5).clamp(0, 1)
    picture: torch.Tensor = first * (1 - way) + second * way
    for colour in colours:
        x, y, size = torch.rand(3, generator=generator)
        picture = torch.where((across - x) ** 2 + (down - y) ** 2 < (0.05 + size / 4) ** 2, colour, picture)
    return picture
