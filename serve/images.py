"""An image or mask as a client sends it -> the PNG that jobs start from. Everything about it is distrusted.

Only PNG, JPEG and WebP are read, whatever else the bytes may be; their pieces are counted and their size is read before
any of them is decoded; and what is kept is encoded anew from the pixels, so that nothing else of the file survives.
"""

from __future__ import annotations

import binascii
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from serve.domain.orders import ResizeMode
from serve.errors import InvalidRequest
from serve.fitting import WHITE_FROM, resized
from serve.image_files import TooMuch, kind_of, walk, webp_size
from serve.settings.orders import LimitSettings

MIN_SIDE = 8
"""Pixels; nothing can be drawn from less, and no model's grid is finer."""
MEDIA_TYPES = ("image/png", "image/jpeg", "image/jpg", "image/webp", "application/octet-stream")
"""What a data URL may say; the bytes decide."""
MAX_RATIO = 16
"""Of the sides of a picture that a model is to look at: most models bring the shorter side to a size of their own, and
a strip's longer side would grow with it beyond all bounds."""
_READABLE = "PNG, JPEG and WebP are read"
_SOME = 1024
_UPRIGHT: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class Upload:
    """A file whose header was found good; its pixels are not decoded yet, and `data` has little else left. `width` and
    `height` are those of the image held upright, as its EXIF `orientation` says. `field` is the order's field that it
    came in."""

    field: str
    data: bytes
    format: str
    orientation: int
    width: int
    height: int


def written_file(field: str, text: str, limits: LimitSettings) -> bytes:
    """The bytes of a file that stands in an order, as a data URL or as base64 alone. Raises InvalidRequest."""
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        kind, *options = head[5:].lower().split(";")
        if kind.startswith("image/svg"):
            raise InvalidRequest(f"{field}: SVG is not read; {_READABLE}", field)
        if not comma or options[-1:] != ["base64"] or kind not in MEDIA_TYPES:
            raise InvalidRequest(f"{field}: a data URL begins with data:image/png;base64, ({_READABLE})", field)
    elif "://" in text[:16]:
        raise InvalidRequest(f"{field}: addresses are not fetched; send the file as base64", field)
    _bound(field, len(text) // 4 * 3 - 2, limits)
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise InvalidRequest(
            f"{field} is neither base64 (in one line, padded) nor a reference such as <job id>/0", field
        ) from None
    _bound(field, len(data), limits)
    return data


def inspect(field: str, data: bytes, limits: LimitSettings) -> Upload:
    """Check the file's kind and size without decoding it. Raises InvalidRequest that names `field`."""
    _bound(field, len(data), limits)
    kind = kind_of(data)
    if kind is None:
        raise InvalidRequest(f"{field} is {_named(data)}; {_READABLE}", field)
    with _Guard(field):
        if kind == "WEBP":  # its decoder takes memory for the whole image when it is made
            _check_size(field, *webp_size(data), limits)
        file = walk(kind, data)
        with _OPEN[kind](io.BytesIO(file.data)) as image:
            _check_size(field, *image.size, limits)
            if file.animated or (kind == "WEBP" and getattr(image, "n_frames", 1) > 1):
                raise InvalidRequest(f"{field} is animated; send one picture", field)
            if image.mode == "CMYK":
                raise InvalidRequest(f"{field} is CMYK, whose colours depend on a printer; send RGB", field)
            width, height = image.size
            if file.orientation in _SIDEWAYS:
                width, height = height, width
    return Upload(field, file.data, kind, file.orientation, width, height)


def image_png(upload: Upload, width: int, height: int, mode: ResizeMode = ResizeMode.STRETCH) -> bytes:
    """The picture as an RGB PNG of width x height, resized (Lanczos) as diffusers does it, or as `mode` says.

    As there, transparency is dropped and not blended with anything; colour profiles are not read; of 16 bits the upper
    8 are kept. Raises InvalidRequest for a file that is broken.
    """
    with _Guard(upload.field):
        image = _pixels(upload).convert("RGB")
        return _png(resized(image, width, height, mode))


def viewed_png(upload: Upload, most: int) -> bytes:
    """The picture as an RGB PNG, made smaller where a side has more than `most` pixels. Raises InvalidRequest for a
    file that is broken, and for a strip."""
    longer, shorter = max(upload.width, upload.height), min(upload.width, upload.height)
    if longer > MAX_RATIO * shorter:
        told = f"{upload.field} is {upload.width} x {upload.height}; one side may be {MAX_RATIO} times the other"
        raise InvalidRequest(told, upload.field)
    scale = min(1.0, most / longer)
    return image_png(upload, max(1, round(upload.width * scale)), max(1, round(upload.height * scale)))


def mask_png(
    upload: Upload, width: int, height: int, mode: ResizeMode = ResizeMode.STRETCH, *, invert: bool = False
) -> bytes:
    """The mask as an L PNG of width x height whose pixels are 0 or 255, made as diffusers does it: resized (Lanczos)
    like its image, then black below one half; `invert` swaps the two. Raises InvalidRequest for a file that is
    broken."""
    below, above = (255, 0) if invert else (0, 255)
    with _Guard(upload.field):
        grey = resized(_pixels(upload).convert("L"), width, height, mode)
        return _png(grey.point([below] * WHITE_FROM + [above] * (256 - WHITE_FROM)))


def cut_out_png(upload: Upload) -> bytes | None:
    """A mask as an L PNG of the picture's own size, 255 where the picture is more than half transparent and 0
    elsewhere; None where that is nowhere. Raises InvalidRequest for a file that is broken."""
    with _Guard(upload.field):
        with _OPEN[upload.format](io.BytesIO(upload.data)) as image:
            if not image.has_transparency_data:  # most have not, and need not be decoded
                return None
        opaque = _pixels(upload).convert("RGBA").getchannel("A")
        mask = opaque.point([255] * WHITE_FROM + [0] * (256 - WHITE_FROM))
        return _png(mask) if mask.getbbox() else None


class _Guard:
    """Whatever a decoder makes of a broken file becomes one refusal. What Pillow raises then has no common class; only
    running out of memory is this server's own affair."""

    def __init__(self, field: str) -> None:
        self._field = field

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, TooMuch):
            raise InvalidRequest(f"{self._field} is {error}", self._field) from None
        if isinstance(error, Exception) and not isinstance(error, InvalidRequest | MemoryError):
            raise InvalidRequest(f"{self._field} is broken or cut short", self._field) from None


def _bound(field: str, size: int, limits: LimitSettings) -> None:
    if size > limits.max_image_bytes:
        raise InvalidRequest(f"{field} is over {limits.max_image_bytes} bytes", field)


def _check_size(field: str, width: int, height: int, limits: LimitSettings) -> None:
    if width * height > limits.max_image_pixels:
        raise InvalidRequest(
            f"{field} is {width} x {height}; at most {limits.max_image_pixels} pixels are decoded", field
        )
    if min(width, height) < MIN_SIDE:
        raise InvalidRequest(f"{field} is {width} x {height}; each side must have {MIN_SIDE} pixels or more", field)


def _named(data: bytes) -> str:
    """What a file that is not read looks like."""
    start = data[:_SOME].lstrip(b"\xef\xbb\xbf\r\n\t ").lower()
    if not data:
        return "empty"
    if start.startswith((b"<svg", b"<?xml", b"<!doctype svg")) or b"<svg" in start:
        return "SVG"
    for mark, name in _OTHERS.items():
        if data.startswith(mark):
            return name
    return {b"avif": "AVIF", b"heic": "HEIC"}.get(data[8:12] if data[4:8] == b"ftyp" else b"", "no image")


_OTHERS: Mapping[bytes, str] = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"%PDF": "PDF"}


# Pillow's classes themselves, because `Image.open` takes a JPEG with several pictures for another format.
_OPEN: Mapping[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
}


def _pixels(upload: Upload) -> Image.Image:
    """Decoded and held upright."""
    image: Image.Image = _OPEN[upload.format](io.BytesIO(upload.data))
    image.load()
    if image.mode.startswith("I"):  # Pillow would cut what is above 255 instead of scaling it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")
    held = _UPRIGHT.get(upload.orientation)
    return image if held is None else image.transpose(held)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.info.clear()  # nor does what the file said of itself survive
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
