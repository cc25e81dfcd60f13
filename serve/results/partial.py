"""A preview of the engine as a file of the picture that it is to become."""

from __future__ import annotations

import io

from PIL import Image

from serve.domain.orders import ImageRequest
from serve.results.encode import QUALITY


def partial_image(preview: bytes, request: ImageRequest) -> bytes:
    """A file of the order's size and format, enlarged from a small JPEG."""
    with Image.open(io.BytesIO(preview), formats=["JPEG"]) as image:
        enlarged = image.resize((request.width, request.height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if request.output_format == "png":
        enlarged.save(file, "PNG", compress_level=1)
    else:
        quality = QUALITY if request.output_compression is None else request.output_compression
        enlarged.save(file, request.output_format.upper(), quality=quality)
    return file.getvalue()
