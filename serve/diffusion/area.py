"""Only what a mask covers is drawn, at the size of the order, and put back into the picture: A1111's "only masked",
`padding_mask_crop` in diffusers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageFilter

from serve.domain.orders import ResizeMode
from serve.fitting import WHITE_FROM, inner_box, resized

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels; the latter two are outside."""

_WHITE = [0] * WHITE_FROM + [255] * (256 - WHITE_FROM)
_TWICE = [min(255, 2 * value) for value in range(256)]


@dataclass(frozen=True, slots=True)
class Area:
    """`box` of `picture` (RGB) is what is drawn. `share` (L), as large as the picture, is how much of what was drawn is
    shown where."""

    picture: Image.Image
    share: Image.Image
    box: Box

    def drawn_from(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """The box of an image, in the size that is drawn. Where its ratio is another one, its edges are repeated
        around it: it is not stretched."""
        return resized(image.crop(self.box), width, height, ResizeMode.FILL)

    def inner(self, width: int, height: int) -> Box:
        """Where in a drawing of that size the box is."""
        return inner_box(self.size, (width, height))

    @property
    def size(self) -> tuple[int, int]:
        left, top, right, bottom = self.box
        return right - left, bottom - top


def area_of(picture: Image.Image, mask: Image.Image, width: int, height: int, *, padding: int, blur: float) -> Area:
    """What of the picture is drawn at width x height: all that the blurred mask reaches and `padding` pixels around it,
    and as much beside it as brings it to that ratio, as far as the picture goes. All of it where the mask is black."""
    share = share_of(mask, blur)
    found = share.getbbox() or (0, 0, *picture.size)
    left, top, right, bottom = found
    padded = (
        max(0, left - padding),
        max(0, top - padding),
        min(picture.width, right + padding),
        min(picture.height, bottom + padding),
    )
    return Area(picture.convert("RGB"), share, _in_ratio(padded, picture.size, width / height))


def share_of(mask: Image.Image, blur: float) -> Image.Image:
    """How much of what was drawn is shown where, as A1111 does it with its Mask blur: twice the mask blurred by a
    Gaussian of that standard deviation (pixels), and at most all. At a straight edge all of the mask is new, and the
    new fades out within three standard deviations outside of it. 0 is a hard edge."""
    white = mask.convert("L").point(_WHITE)
    return white.filter(ImageFilter.GaussianBlur(blur)).point(_TWICE) if blur > 0 else white


def _in_ratio(box: Box, size: tuple[int, int], ratio: float) -> Box:
    """The box, wider or higher, as near to width / height = `ratio` as a picture of that size lets it be."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    if width < ratio * height:
        left, right = _widened(left, right, math.ceil(ratio * height), size[0])
    else:
        top, bottom = _widened(top, bottom, math.ceil(width / ratio), size[1])
    return left, top, right, bottom


def _widened(begin: int, end: int, to: int, most: int) -> tuple[int, int]:
    """So long about the same middle; moved where that would be outside of 0 to `most`."""
    to = min(max(to, end - begin), most)
    begin = min(max(0, begin - (to - (end - begin)) // 2), most - to)
    return begin, begin + to
