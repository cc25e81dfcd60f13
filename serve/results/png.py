"""What a picture says of itself, twice: as JSON (exact) and as A1111's text (`infotext.py`), which other tools read
when the picture is dropped on them; and PNG files that say it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image, PngImagePlugin

from serve.domain.orders import ImageRequest
from serve.results.infotext import PARAMETERS, as_text

JSON_CHUNK = "tandem"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"iTXt")
COMPRESS_LEVEL = 3
"""zlib's: half of the time of its default (6), for files of 1 % less to 18 % more (docs/performance.md)."""
_NOT_KEPT = ("salt", "num_images", "preview_every", "image", "mask", "composed", "template", "arm")
"""Fields of a request that say nothing of the picture, or that are nobody else's: a reference to what the job started
from opens that to whoever is shown the picture."""


def parameters(request: ImageRequest, index: int, approximate: Sequence[str] = ()) -> dict[str, Any]:
    """What is written into image `index` of a job: the order of this picture alone, without the fields that have no
    value and without what it starts from, and `approximate`, what kept the picture from being exact."""
    known = {name: value for name, value in asdict(request).items() if name not in _NOT_KEPT and value is not None}
    told = {"seed": request.seed_of(index), "variation_seed": request.variation_seed_of(index)}
    known |= {name: value for name, value in told.items() if value is not None}
    return known | ({"approximate": list(approximate)} if approximate else {})


def encode_png(image: Image.Image, parameters: Mapping[str, Any]) -> bytes:
    """The image as PNG with `parameters`, whose values JSON can hold. Equal input gives equal bytes."""
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=_notes(parameters), compress_level=COMPRESS_LEVEL)
    return file.getvalue()


def text_chunks(parameters: Mapping[str, Any]) -> list[tuple[bytes, bytes]]:
    """What `encode_png` writes of them, as (kind, data)."""
    return [(kind, data) for kind, data, _ in _notes(parameters).chunks]


def retold(data: bytes, text: str) -> bytes:
    """A PNG that this server wrote, with `text` in the place of its own of A1111's form; another file as it is."""
    if not data.startswith(_SIGNATURE):
        return data
    file, place = io.BytesIO(), len(_SIGNATURE)
    file.write(_SIGNATURE)
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        kind, named = data[place + 4 : place + 8], data[place + 8 : end].startswith(PARAMETERS.encode() + b"\0")
        if not (named and kind in _TEXTS):
            file.write(data[place:end])
        if kind == b"IHDR":
            for kind, body, _ in _told(text).chunks:
                PngImagePlugin.putchunk(file, kind, body)
        place = end
    return file.getvalue()


def _notes(parameters: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    notes = _told(as_text(parameters))
    notes.add_text(JSON_CHUNK, json.dumps(dict(parameters)))
    return notes


def _told(text: str) -> PngImagePlugin.PngInfo:
    notes = PngImagePlugin.PngInfo()
    # Latin-1 goes into a tEXt chunk, everything else into iTXt; a lone surrogate has no UTF-8.
    notes.add_text(PARAMETERS, text.encode("utf-8", "replace").decode())
    return notes
