"""What is transparent in a picture, as a mask."""

import io

import numpy as np
import pytest
from PIL import Image

from serve.errors import InvalidRequest
from serve.images import cut_out_png, inspect
from serve.settings.orders import LimitSettings

SIZE = (24, 16)
LEFT = np.s_[:, :12]


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_alpha(alpha: int, mode: str = "RGBA") -> Image.Image:
    """Grey noise, whose left half has this alpha, and 255 the right one."""
    pixels = np.random.default_rng(1).integers(0, 256, (16, 24, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[LEFT][..., 3] = alpha
    return Image.fromarray(pixels).convert(mode)


def mask_of(data: bytes) -> np.ndarray | None:
    mask = cut_out_png(inspect("mask", data, LimitSettings()))
    if mask is None:
        return None
    with Image.open(io.BytesIO(mask)) as image:
        assert (image.mode, image.size) == ("L", SIZE)
        return np.asarray(image)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("alpha", [0, 127])
def test_what_is_more_than_half_transparent_is_white(mode: str, alpha: int) -> None:
    mask = mask_of(saved(with_alpha(alpha, mode)))
    assert mask is not None
    assert (mask[LEFT] == 255).all()
    assert (mask[:, 12:] == 0).all()


def test_a_webp_and_a_palette_have_transparency_too() -> None:
    webp = mask_of(saved(with_alpha(0), "WEBP", lossless=True))
    assert webp is not None
    palette = Image.new("P", SIZE, 1)
    palette.paste(0, (0, 0, 12, 16))
    mask = mask_of(saved(palette, transparency=0))
    assert mask is not None
    assert (mask == webp).all()


@pytest.mark.parametrize(
    "data",
    [saved(with_alpha(128)), saved(with_alpha(255)), saved(with_alpha(0, "RGB")), saved(with_alpha(0, "RGB"), "JPEG")],
)
def test_an_opaque_picture_has_no_mask(data: bytes) -> None:
    assert mask_of(data) is None


def test_a_picture_that_lies_on_its_side_has_its_mask_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = with_alpha(0).transpose(Image.Transpose.ROTATE_90)
    mask = mask_of(saved(turned, exif=exif))
    assert mask is not None
    assert (mask[LEFT] == 255).all()


def test_a_broken_picture_is_refused() -> None:
    data = saved(with_alpha(0))
    with pytest.raises(InvalidRequest, match="broken or cut short"):
        mask_of(data[:60] + bytes(20) + data[80:])
