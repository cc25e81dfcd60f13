"""What stands under a mask before the first step, where it is not the picture's own."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from serve.diffusion.area import share_of

NARROWER = 4
"""From one blur to the next."""


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image (RGB) with what is white in the mask painted over by the colours around it: near its edge by those
    nearby, far from it by more and more distant ones, in the end by the mean of all. Where nothing is beside the mask,
    the image as it is.

    Normalised convolution (Knutsson & Westin 1993): blurred pixels divided by how much of the blur saw any, the wide
    blurs first and the narrow ones over them, where they saw enough.
    """
    white = share_of(mask, 0)
    known = ImageChops.invert(white)
    if known.getbbox() is None:
        return image
    shown = Image.composite(image, Image.new("RGB", image.size), known)
    mean = np.asarray(image)[np.asarray(known) > 0].mean(0).round().astype(int)
    painted = Image.new("RGB", image.size, tuple(mean.tolist()))
    blur = max(image.size) / NARROWER
    while blur >= 1:
        gaussian = ImageFilter.GaussianBlur(blur)
        seen = known.filter(gaussian)
        painted = Image.composite(_divided(shown.filter(gaussian), seen), painted, ImageChops.add(seen, seen))
        blur /= NARROWER
    return Image.composite(image, painted, known)


def _divided(image: Image.Image, by: Image.Image) -> Image.Image:
    """Each channel by `by` / 255."""
    pixels = np.asarray(image, np.float32) * 255 / np.maximum(np.asarray(by, np.float32), 1)[..., None]
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
