"""The one shape of a result's key: a job's id, and one of its pictures. Nothing that a user wrote is part of a path.

<job id>/<index>.png    an image that was drawn; .jpg and .webp too
<job id>/image.png      what the job starts from
<job id>/mask.png       which part of that it repaints
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

CONTENT_TYPES: Mapping[str, str] = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
"""By the extension of a key."""

_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}/(?:[0-9]{1,4}\.(?:png|jpg|webp)|(?:image|mask)\.png)")
_REFERENCE = re.compile(r"([0-9a-f]{32})/([0-9]{1,4}|image|mask)")


def checked(key: str) -> str:
    """ValueError unless `key` has the shape."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"not a result key: {key!r}")
    return key


def input_key(job_id: str, field: str) -> str:
    """Of what a job starts from; `field` is `image` or `mask`."""
    return checked(f"{job_id}/{field}.png")


def content_type(key: str) -> str:
    """Of the file that is kept under a key."""
    return CONTENT_TYPES[PurePosixPath(checked(key)).suffix[1:]]


def reference(key: str) -> str:
    """How a client names the picture of a key in an order: `<job id>/image`."""
    return str(PurePosixPath(checked(key)).with_suffix(""))


def split(text: str) -> tuple[str, str] | None:
    """(job id, index or `image` or `mask`) of what looks like a reference."""
    found = _REFERENCE.fullmatch(text)
    return (found[1], found[2]) if found else None
