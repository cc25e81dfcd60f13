"""Which libraries compute embeddings here: another version may round otherwise, or mend what was wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("torch", "transformers", "bitsandbytes")
"""torch computes, transformers says what, bitsandbytes unpacks 8-bit and 4-bit weights."""


@cache
def computed_by() -> str:
    """8 hex digits that are the same where the same versions are installed. They stand in the cache's keys, so that two
    releases side by side share a Redis and no value. The build (`+cu128`, `+cpu`) does not count, as the device does
    not: within one release cards of several kinds share what any of them has computed."""
    return digest_of(_installed)


def digest_of(installed: Callable[[str], str]) -> str:
    """Of the versions that `installed` says."""
    told = " ".join(f"{name} {installed(name).partition('+')[0]}" for name in LIBRARIES)
    return hashlib.blake2b(told.encode(), digest_size=4).hexdigest()


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
