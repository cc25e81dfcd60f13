"""What makes a submission idempotent: the id that it is logged under, and the fingerprint of its order."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from dataclasses import dataclass

from serve.orders import NewImage

_LARGE = ("image", "mask")


@dataclass(frozen=True, slots=True)
class Once:
    """Makes a submission idempotent: the same order under the same id is the same job. `named` is what the client gave,
    `Idempotency-Key` or `id`."""

    job_id: str
    named: str

    @classmethod
    def under_key(cls, owner: str, key: str) -> Once:
        """Owners' keys are apart from each other."""
        text = f"{len(owner)}:{owner}{key}"
        return cls(hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), "Idempotency-Key")


async def fingerprint_of(new: NewImage) -> str:
    """Of the order as the client wrote it. A field that has its default counts like one that was left out, so that a
    release with more fields knows its predecessor's orders again."""
    defaults = {each.name: each.default for each in dataclasses.fields(new)}
    written = {name: value for name in defaults if name != "salt" and (value := getattr(new, name)) != defaults[name]}

    def hashed() -> str:
        return hashlib.blake2b(json.dumps(written, sort_keys=True).encode(), digest_size=16).hexdigest()

    # Megabytes of a picture take a while, in which others want to be served.
    return await asyncio.to_thread(hashed) if written.keys() & set(_LARGE) else hashed()
