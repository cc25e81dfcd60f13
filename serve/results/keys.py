"""The one shape of a result's key: a job's id, and one of its objects. Nothing that a user wrote is part of a path.

<job id>/<index>.png           an image that was drawn; .jpg and .webp too
<job id>/manifest.json         what the images are, put when all of them are there
<job id>/image-<8 hex>.png     what the job starts from; the nonce keeps two submissions under one id apart
<job id>/mask-<8 hex>.png      which part of that it repaints
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

CONTENT_TYPES: Mapping[str, str] = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
"""Of pictures, by the extension of a key."""

_MANIFEST = "manifest.json"
_JOB = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PICTURE = re.compile(
    r"(?P<job>[A-Za-z0-9_-]{1,64})/(?:(?P<index>[0-9]{1,4})\.(?:png|jpg|webp)|(?P<field>image|mask)-[0-9a-f]{8}\.png)"
)
_REFERENCE = re.compile(r"([0-9a-f]{32})/([0-9]{1,4}|image|mask)")


def checked(key: str) -> str:
    """ValueError unless `key` has the shape."""
    job_id, _, name = key.partition("/")
    if not _PICTURE.fullmatch(key) and not (name == _MANIFEST and _JOB.fullmatch(job_id)):
        raise ValueError(f"not a result key: {key!r}")
    return key


def checked_job(job_id: str) -> str:
    """ValueError unless `job_id` has the shape of one, which names a folder of the store."""
    if not _JOB.fullmatch(job_id):
        raise ValueError(f"not a job's id: {job_id!r}")
    return job_id


def input_key(job_id: str, field: str, nonce: str) -> str:
    """Of what a job starts from; `field` is `image` or `mask`, `nonce` 8 hexadecimal digits of the submission's own:
    what one submission puts and deletes again is never another's."""
    return checked(f"{job_id}/{field}-{nonce}.png")


def manifest_key(job_id: str) -> str:
    return checked(f"{job_id}/{_MANIFEST}")


def content_type(key: str) -> str:
    """Of the object that is kept under a key."""
    suffix = PurePosixPath(checked(key)).suffix[1:]
    return "application/json" if suffix == "json" else CONTENT_TYPES[suffix]


def reference(key: str) -> str:
    """How a client names the picture of a key in an order: `<job id>/image`. ValueError for what is no picture."""
    found = _PICTURE.fullmatch(key)
    if not found:
        raise ValueError(f"not the key of a picture: {key!r}")
    return f"{found['job']}/{found['index'] or found['field']}"


def split(text: str) -> tuple[str, str] | None:
    """(job id, index or `image` or `mask`) of what looks like a reference."""
    found = _REFERENCE.fullmatch(text)
    return (found[1], found[2]) if found else None
