"""What a picture from anywhere says of itself: the texts in a PNG, the comment in a JPEG's or WebP's EXIF.

No pixels are decoded. `serve.images.inspect` has to have found the file good: that bounds its pieces.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import ExifTags, Image

from serve.errors import InvalidRequest
from serve.results.encode import FORMATS
from serve.results.infotext import PARAMETERS

MOST = 1024 * 1024
"""Bytes that a picture may say of itself, all in all, however small they were packed."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PLAIN, _PACKED, _WIDE = b"tEXt", b"zTXt", b"iTXt"
_UNICODE, _ASCII, _UNNAMED = b"UNICODE\0", b"ASCII\0\0\0", bytes(8)
"""How EXIF's UserComment begins."""


@dataclass(frozen=True, slots=True)
class Notes:
    """`info` is A1111's text, "" where there is none; `items` are the other texts, by their names."""

    info: str
    items: dict[str, str]


def read_notes(data: bytes) -> Notes:
    """Of a PNG, JPEG or WebP. InvalidRequest for what is none, or says too much."""
    try:
        texts = dict(_chunks(data)) if data.startswith(_PNG) else _exif(data)
    except (InvalidRequest, MemoryError):
        raise
    except Exception:  # noqa: BLE001  what Pillow raises for a broken file has no common class
        raise InvalidRequest("image is broken or cut short", "image") from None
    if sum(len(name) + len(text) for name, text in texts.items()) > MOST:
        raise _too_much()
    return Notes(texts.pop(PARAMETERS, "").strip(), texts)


def _chunks(data: bytes) -> Iterator[tuple[str, str]]:
    """The texts of a PNG: https://www.w3.org/TR/png-3/#11textinfo. One that is named twice is told as it was last."""
    place, left = len(_PNG), MOST
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        kind = data[place + 4 : place + 8]
        if kind in (_PLAIN, _PACKED, _WIDE):
            name, _, body = data[place + 8 : end - 4].partition(b"\0")
            text = _text(kind, body, left)
            left -= len(name) + len(text)
            if left < 0:
                raise _too_much()
            yield name.decode("latin-1"), text.decode("utf-8" if kind == _WIDE else "latin-1", "replace")
        place = end


def _text(kind: bytes, body: bytes, left: int) -> bytes:
    """Of the chunk's body behind the name; no more than `left` bytes and one."""
    packed = kind == _PACKED
    if packed:
        body = body[1:]
    elif kind == _WIDE:
        packed = body[:1] == b"\1"
        _language, _, body = body[2:].partition(b"\0")
        _name, _, body = body.partition(b"\0")
    return zlib.decompressobj().decompress(body, left + 1) if packed else body


def _exif(data: bytes) -> dict[str, str]:
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS[1:]) as image:
        exif = dict(image.getexif())
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    texts = {ExifTags.TAGS[tag]: text for tag, text in exif.items() if tag in ExifTags.TAGS and isinstance(text, str)}
    if isinstance(comment, bytes):
        texts[PARAMETERS] = _comment(comment)
    return texts


def _comment(comment: bytes) -> str:
    """A1111 writes UTF-16, its high bytes first; others write what they have at hand. Most of the text is ASCII, whose
    high bytes are zero: that tells which are which."""
    head, body = comment[:8], comment[8:]
    if head == _UNICODE:
        swapped = body[1::2].count(0) > body[::2].count(0)
        return body.decode("utf-16-le" if swapped else "utf-16-be", "replace").lstrip("\ufeff").rstrip("\0")
    return (body if head in (_ASCII, _UNNAMED) else comment).decode("utf-8", "replace").rstrip("\0")


def _too_much() -> InvalidRequest:
    return InvalidRequest(f"image says more of itself than {MOST} bytes", "image")
