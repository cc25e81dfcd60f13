"""Files that a client may send as pictures."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

from PIL import Image


def written(kind: str = "PNG", size: tuple[int, int] = (64, 64), mode: str = "RGB", **how: Any) -> str:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, kind, **how)
    return base64.b64encode(buffer.getvalue()).decode()


def bomb(side: int = 50_000) -> str:
    """A PNG of a few hundred bytes that says that it has 2.5 billion pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", head), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")
    data = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + data).decode()


def png(**how: Any) -> bytes:
    return base64.b64decode(written(**how))
