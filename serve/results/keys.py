"""The one shape of a result's key: `<job id>/<index>.png`. Nothing that a user wrote can become part of a path."""

from __future__ import annotations

import re

_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}/[0-9]{1,4}\.png")


def checked(key: str) -> str:
    """ValueError unless `key` has the shape."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"not a result key: {key!r}")
    return key
