"""What comes of a put."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stored:
    """`bytes` is the size of the object that the store holds under the key now. `created` is False where another put
    was first and its object stays."""

    bytes: int
    created: bool
