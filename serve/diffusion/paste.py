"""The pixels of the image that a job started from, back where its mask is black."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from serve.diffusion.run import Picture, Work

_WHITE = [0] * 128 + [255] * 128
_TWICE = [min(255, 2 * value) for value in range(256)]


def pasted(picture: Picture, work: Work) -> Picture:
    """The picture, where the request's `mask_blur` says so over the image it started from: of that, what is a good way
    off the mask stays to the bit, which a VAE there and back can't do.

    As A1111 does it with its Mask blur: the share of what was drawn is twice the mask blurred by a Gaussian of that
    standard deviation (pixels), and at most 1. At a straight edge all of the mask is new, and the new fades out within
    three standard deviations outside of it. 0 is a hard edge.
    """
    blur = work.request.mask_blur
    if blur is None or work.image is None or work.mask is None:
        return picture
    share = work.mask.convert("L").point(_WHITE)
    if blur > 0:
        share = share.filter(ImageFilter.GaussianBlur(blur)).point(_TWICE)
    image = work.image.convert("RGB")
    return Image.composite(picture, image, share) if isinstance(picture, Image.Image) else _deep(picture, image, share)


def _deep(picture: npt.NDArray[np.uint16], image: Image.Image, share: Image.Image) -> npt.NDArray[np.uint16]:
    """What `Image.composite` does, of 16 bits. As there, exact where the share is 0 or 255."""
    of_new = np.asarray(share, np.uint32)[..., None]
    mixed = np.asarray(image, np.uint32) * 257 * (255 - of_new) + picture * of_new + 127
    return (mixed // 255).astype(np.uint16)
