"""PNG files of 16 bits a channel, which Pillow can't write: https://www.w3.org/TR/png-3/"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB = 2
_BYTES_A_PIXEL = 6
_LEVEL = 6
_SUB, _UP = 1, 2


def encode_png16(pixels: NDArray[np.uint16], chunks: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """An RGB image (H, W, 3) as PNG with these further chunks (kind, data) before its pixels. Equal input gives equal
    bytes."""
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, _RGB, 0, 0, 0)
    data = zlib.compress(_filtered(pixels), _LEVEL)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return _SIGNATURE + b"".join(_chunk(kind, body) for kind, body in parts)


def _filtered(pixels: NDArray[np.uint16]) -> bytes:
    """The rows, each as the difference to its left or to its upper neighbours, whichever is the smaller in sum: what
    the specification suggests (12.7)."""
    height, width, _ = pixels.shape
    raw = np.ascontiguousarray(pixels, dtype=">u2").view(np.uint8).reshape(height, width * _BYTES_A_PIXEL)
    sub, up = raw.copy(), raw.copy()
    sub[:, _BYTES_A_PIXEL:] -= raw[:, :-_BYTES_A_PIXEL]
    up[1:] -= raw[:-1]
    by_sub = _size(sub) <= _size(up)
    rows = np.empty((height, 1 + raw.shape[1]), np.uint8)
    rows[:, 0] = np.where(by_sub, _SUB, _UP)
    rows[:, 1:] = np.where(by_sub[:, None], sub, up)
    return rows.tobytes()


def _size(rows: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Of differences modulo 256, by row."""
    distance: NDArray[np.int64] = np.minimum(rows, 0 - rows).sum(axis=1, dtype=np.int64)
    return distance


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
