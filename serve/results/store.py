"""Where finished images are kept, each stored once: the key is made from job id and index, and the first put stays."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from serve.results.local import LocalStore
from serve.results.stored import Stored
from serve.settings.stores import ResultSettings

__all__ = ["ResultStore", "Stored", "open_store"]


class ResultStore(Protocol):
    """Image bytes by key. Keys have the shape of `keys.py`, else ValueError.

    A store that is away, full or refuses: BackendUnavailable, after a few retries of its own where that makes sense.
    """

    kind: str
    """`local` or `s3`."""

    async def put(self, key: str, data: bytes, content_type: str) -> Stored:
        """Store durably and whole, or not at all. An object that is there already stays as it is."""
        ...

    async def get(self, key: str) -> bytes:
        """JobNotFound when there is none."""
        ...

    async def size(self, key: str) -> int | None:
        """Bytes of the object, None when there is none."""
        ...

    async def delete(self, key: str) -> None:
        """Nothing happens when there is none."""

    async def delete_job(self, job_id: str) -> None:
        """Delete everything under `<job id>/` that is there at the time; what a writer puts meanwhile may stay. Nothing
        happens when there is nothing. ValueError for an id of another shape."""

    def url(self, key: str) -> str | None:
        """A URL from which a client may GET the image for a while; None where the server has to hand it out."""
        ...

    async def check(self) -> None:
        """Write something. OperatorError names the setting at fault, BackendUnavailable a store that is away."""


def open_store(settings: ResultSettings, data_dir: Path) -> ResultStore:
    """The store that the settings name; it is not contacted yet."""
    if settings.store == "local":
        return LocalStore(data_dir / "images")
    from serve.results.s3 import S3Store  # boto3 takes a while to import

    return S3Store(settings.s3)
