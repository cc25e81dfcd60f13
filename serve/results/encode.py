"""Image files, PNG, JPEG or WebP, that say how they were made.

PNG keeps what it says in text chunks (`png.py`). JPEG and WebP keep it in their EXIF: A1111's text as UserComment,
where A1111 and the tools beside it look for it, and the JSON as ImageDescription, which they pass over.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.domain.orders import ImageRequest
from serve.errors import InvalidRequest
from serve.results.infotext import as_text
from serve.results.keys import CONTENT_TYPES
from serve.results.png import JSON_CHUNK, encode_png, text_chunks
from serve.results.png16 import encode_png16

FORMATS = ("png", "jpeg", "webp")
QUALITY = 90
"""Of JPEG and WebP where the order names none."""
MAX_SIDE: Mapping[str, int] = {"jpeg": 65535, "webp": 16383}
"""The longest side that a format can hold, in pixels."""

_EXTENSION = {"png": "png", "jpeg": "jpg", "webp": "webp"}
_DESCRIPTION, _EXIF_IFD, _COMMENT = 0x010E, 0x8769, 0x9286
_UNICODE = b"UNICODE\0"
_MAX_EXIF = 65_000
"""Bytes: one segment of a JPEG holds no more than 65,533."""


def encode_image(
    image: Image.Image | NDArray[np.uint16], request: ImageRequest, parameters: Mapping[str, Any]
) -> tuple[bytes, str, str]:
    """The file that `request` asks for, its content type, and the extension of its key.

    `image` is an RGB image, or uint16 (H, W, 3) with `bit_depth` 16. Equal input gives equal bytes. JPEG holds 64 KiB
    of parameters: from longer ones it leaves out the text, and the JSON too where that alone is longer.
    """
    extension = _EXTENSION[request.output_format]
    if not isinstance(image, Image.Image):
        data = encode_png16(image, text_chunks(parameters))
    elif request.output_format == "png":
        data = encode_png(image, parameters)
    else:
        data = _encoded(image, request, parameters)
    return data, CONTENT_TYPES[extension], extension


def quality_of(output_format: str, output_compression: int | None, bit_depth: int, side: int) -> int | None:
    """The quality that a file will have, None for a PNG. Raises InvalidRequest for what no such file can be; `side` is
    the picture's longer one, in pixels."""
    kind, quality = output_format, QUALITY if output_compression is None else output_compression
    if kind not in FORMATS:
        raise InvalidRequest(f"output_format: there are {', '.join(FORMATS)}", "output_format")
    if bit_depth not in (8, 16):
        raise InvalidRequest("bit_depth must be 8 or 16", "bit_depth")
    if kind == "png":
        if output_compression is not None:
            raise InvalidRequest("output_compression is for jpeg and webp; a png is exact", "output_compression")
        return None
    if bit_depth != 8:
        raise InvalidRequest(f"bit_depth: a {kind} has 8; only a png has 16", "bit_depth")
    if side > MAX_SIDE[kind]:
        raise InvalidRequest(f"output_format: a {kind} has no side over {MAX_SIDE[kind]} pixels", "output_format")
    if not 0 <= quality <= 100:
        raise InvalidRequest("output_compression must be between 0 and 100", "output_compression")
    return quality


def read_parameters(data: bytes) -> dict[str, Any]:
    """What `encode_image` was given. InvalidRequest for a file that is none of the three or was made by something
    else."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            told = image.info.get(JSON_CHUNK) if image.format == "PNG" else image.getexif().get(_DESCRIPTION)
            parameters = json.loads(told or "null")
    except (OSError, ValueError, TypeError, SyntaxError, RecursionError, Image.DecompressionBombError):
        raise InvalidRequest("the file is not a readable PNG, JPEG or WebP", "image") from None
    if not isinstance(parameters, dict):
        raise InvalidRequest("the file does not say how it was made", "image")
    return parameters


def _encoded(image: Image.Image, request: ImageRequest, parameters: Mapping[str, Any]) -> bytes:
    quality = QUALITY if request.output_compression is None else request.output_compression
    most = _MAX_EXIF if request.output_format == "jpeg" else None
    file = io.BytesIO()
    image.save(file, request.output_format.upper(), quality=quality, exif=_exif(parameters, most))
    return file.getvalue()


def _exif(parameters: Mapping[str, Any], most: int | None) -> bytes:
    """As many of the parameters as `most` bytes hold, the exact form first."""
    exif = Image.Exif()
    exif[_DESCRIPTION] = json.dumps(dict(parameters))
    exact = exif.tobytes()
    exif.get_ifd(_EXIF_IFD)[_COMMENT] = _UNICODE + as_text(parameters).encode("utf-16-be", "replace")
    both = exif.tobytes()
    return next((told for told in (both, exact) if most is None or len(told) <= most), b"")
