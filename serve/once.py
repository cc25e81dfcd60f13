"""What makes a submission idempotent: the name that it is known under, and the fingerprint of its order."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from dataclasses import dataclass

from serve.orders import NewImage

_LARGE = ("image", "mask")


@dataclass(frozen=True, slots=True, kw_only=True)
class Once:
    """Makes a submission idempotent: the same order under the same name is the same job. The name is either the `key`
    that its owner gave (`Idempotency-Key`), or the `job_id` itself."""

    key: str | None = None
    job_id: str | None = None

    @property
    def named(self) -> str:
        """What the client gave, in messages."""
        return "id" if self.key is None else "Idempotency-Key"


async def fingerprint_of(new: NewImage) -> str:
    """Of the order as the client wrote it. A field that has its default counts like one that was left out, so that a
    release with more fields knows its predecessor's orders again."""
    defaults = {each.name: each.default for each in dataclasses.fields(new)}
    written = {name: value for name in defaults if name != "salt" and (value := getattr(new, name)) != defaults[name]}

    def hashed() -> str:
        return hashlib.blake2b(json.dumps(written, sort_keys=True).encode(), digest_size=16).hexdigest()

    # Megabytes of a picture take a while, in which others want to be served.
    return await asyncio.to_thread(hashed) if written.keys() & set(_LARGE) else hashed()
