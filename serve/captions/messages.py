"""What crosses between the door, the pool and the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ask:
    """One picture to describe: an RGB PNG of our own making. `prompt` is what the model is told of it.

    Equal ones share a caption while it is made, but for those of different tenants (`salt`): a shorter wait would tell
    one of them what another has just asked for.
    """

    picture: bytes
    prompt: str
    max_new_tokens: int
    salt: str = ""


@dataclass(frozen=True, slots=True)
class Caption:
    """`tokens` are those of the text, without the marks that begin and end it."""

    text: str
    tokens: int
