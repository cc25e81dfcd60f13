"""The pixels of the picture that a job started from, back where its mask leaves them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from serve.diffusion.area import Box
from serve.diffusion.run import Picture, Work


def pasted(picture: Picture, work: Work) -> Picture:
    """What was drawn, in its place in the picture that it was drawn over, as far as the mask shows it: the rest stays
    to the bit, which a VAE there and back can't do. Without `Work.area` all of the answer is what was drawn."""
    area = work.area
    if area is None:
        return picture
    shown, before = area.share.crop(area.box), area.picture.crop(area.box)
    if isinstance(picture, Image.Image):
        whole = area.picture.copy()
        part = _sized(picture, area.inner(*picture.size), area.size)
        whole.paste(Image.composite(part, before, shown), area.box)
        return whole
    height, width, _ = picture.shape
    left, top, right, bottom = area.box
    pixels: npt.NDArray[np.uint16] = np.asarray(area.picture, np.uint16) * 257
    deep = _sized_deep(picture, area.inner(width, height), area.size)
    pixels[top:bottom, left:right] = _mixed(before, deep, shown)
    return pixels


def _mixed(image: Image.Image, drawn: npt.NDArray[np.uint16], share: Image.Image) -> npt.NDArray[np.uint16]:
    """What `Image.composite` does, of 16 bits. As there, exact where the share is 0 or 255."""
    of_new = np.asarray(share, np.uint32)[..., None]
    mixed = np.asarray(image, np.uint32) * 257 * (255 - of_new) + drawn * of_new + 127
    return (mixed // 255).astype(np.uint16)


def _sized(drawn: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """The box of it, at that size."""
    part = drawn.crop(box)
    return part if part.size == size else part.resize(size, Image.Resampling.LANCZOS)


def _sized_deep(drawn: npt.NDArray[np.uint16], box: Box, size: tuple[int, int]) -> npt.NDArray[np.uint16]:
    """The same of 16 bits, which Pillow resizes as one channel of floats at a time."""
    left, top, right, bottom = box
    part = drawn[top:bottom, left:right]
    if (right - left, bottom - top) == size:
        return part
    channels = [
        np.asarray(Image.fromarray(part[..., each].astype(np.float32)).resize(size, Image.Resampling.LANCZOS))
        for each in range(part.shape[2])
    ]
    pixels: npt.NDArray[np.uint16] = np.clip(np.rint(np.stack(channels, -1)), 0, 65535).astype(np.uint16)
    return pixels
