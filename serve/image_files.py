"""PNG, JPEG and WebP files from strangers, walked without a decoder: what they are, in a bounded number of steps.

A decoder spends Python's time on every chunk of a file, however small. So the chunks are counted first, and of PNG and
JPEG only those that make the pixels are handed on. All else that a file says of itself is dropped, but which way up it
is to be held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

MAX_CHUNKS = 20_000
"""Of a PNG; one of 16 MiB in the usual pieces of 8 KiB has two thousand."""
MAX_SEGMENTS = 1_000
"""Of a JPEG before its first scan, and chunks of a WebP; usual files have some dozens."""
MAX_SCANS = 100
"""Scans of a JPEG. Usual progressive files have about ten; each costs a pass over the whole image, however few bytes
it takes."""
UPRIGHT = 1

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_JFIF, _EXIF, _ADOBE, _LAST_APP, _COMMENT = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
_SCAN, _ALONE = 0xDA, (0x01, *range(0xD0, 0xD8))
_ORIENTATION, _SHORT, _ENTRY = 0x0112, 3, 12
_MAX_ENTRIES = 256


class TooMuch(Exception):
    """The file has more pieces than are walked. Its text is fit for the client: it says of what."""


@dataclass(frozen=True, slots=True)
class Walked:
    """`data` is what a decoder is to see. `orientation` is EXIF's, 1 to 8; 1 where the file says nothing readable.
    `animated` is for a PNG to say: a WebP's decoder counts the frames."""

    data: bytes
    orientation: int = UPRIGHT
    animated: bool = False


def kind_of(data: bytes) -> str | None:
    """By its first bytes: PNG, JPEG or WEBP."""
    if data.startswith(_PNG):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def walk(kind: str, data: bytes) -> Walked:
    """A file of that kind. TooMuch; ValueError for one that is cut short or broken."""
    return {"PNG": _png, "JPEG": _jpeg, "WEBP": _webp}[kind](data)


def webp_size(data: bytes) -> tuple[int, int]:
    """Of the canvas: https://developers.google.com/speed/webp/docs/riff_container. ValueError where there is none."""
    chunk = data[12:16]
    if len(data) < 30 or chunk not in (b"VP8X", b"VP8L", b"VP8 "):
        raise ValueError("not a WebP image")
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _png(data: bytes) -> Walked:
    kept, exif, animated, place = [_PNG], b"", False, len(_PNG)
    for _ in range(MAX_CHUNKS):
        name, end = data[place + 4 : place + 8], place + 12 + int.from_bytes(data[place : place + 4], "big")
        if len(name) < 4 or end > len(data):
            raise ValueError("cut short")
        if name in _PNG_PIXELS:
            kept.append(data[place:end])
        elif name == b"eXIf":
            exif = data[place + 8 : end - 4]
        elif name == b"acTL":
            animated = int.from_bytes(data[place + 8 : place + 12], "big") > 1
        if name == b"IEND":
            return Walked(b"".join(kept), _orientation(exif), animated)
        place = end
    raise TooMuch(f"a PNG of more than {MAX_CHUNKS} chunks")


def _jpeg(data: bytes) -> Walked:
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise TooMuch(f"a JPEG of more than {MAX_SCANS} scans")
    kept, exif = [data[:2]], b""
    for marker, place, end in _segments(data):
        if marker == _SCAN:
            return Walked(b"".join([*kept, data[place:]]), _orientation(exif))
        if marker == _EXIF and not exif and data[place + 4 : place + 10] == b"Exif\0\0":
            exif = data[place + 10 : end]
        # Of what applications note, the decoder wants to know how the colours are meant.
        if marker in (_JFIF, _ADOBE) or not (_JFIF <= marker <= _LAST_APP or marker == _COMMENT):
            kept.append(data[place:end])
    raise TooMuch(f"a JPEG of more than {MAX_SEGMENTS} segments")


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, its place, the end of its segment), at most MAX_SEGMENTS; fill bytes count too."""
    place = 2
    for _ in range(MAX_SEGMENTS):
        if place + 4 > len(data) or data[place] != 0xFF:
            raise ValueError("no marker where one must be")
        marker, end = data[place + 1], place + 2
        if marker == 0xFF:
            end = place + 1
        elif marker not in _ALONE:
            end += int.from_bytes(data[place + 2 : place + 4], "big")
        if marker != 0xFF:
            yield marker, place, end
        place = end


def _webp(data: bytes) -> Walked:
    if data[12:16] != b"VP8X":  # the one chunk that there is holds the picture
        return Walked(data)
    place = 12
    for _ in range(MAX_SEGMENTS):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        if data[place : place + 4] == b"EXIF":
            note = data[place + 8 : place + 8 + size]
            return Walked(data, _orientation(note.removeprefix(b"Exif\0\0")))
        place += 8 + size + size % 2
        if place >= len(data):
            return Walked(data)
    raise TooMuch(f"a WebP of more than {MAX_SEGMENTS} chunks")


_ORDERS: Mapping[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}


def _orientation(exif: bytes) -> int:
    """Of a TIFF header and its first directory. A broken note about the picture is no broken picture."""
    order = _ORDERS.get(exif[:4])
    if order is None:
        return UPRIGHT

    def number(place: int, size: int) -> int:
        return int.from_bytes(exif[place : place + size], order)

    first = number(4, 4)
    for place in range(first + 2, first + 2 + _ENTRY * min(number(first, 2), _MAX_ENTRIES), _ENTRY):
        if number(place, 2) == _ORIENTATION:
            value = number(place + 8, 2) if number(place + 2, 2) == _SHORT else UPRIGHT
            return value if 1 <= value <= 8 else UPRIGHT
    return UPRIGHT
