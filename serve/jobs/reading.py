"""What another release wrote, read as far as this one understands it.

Only what a job comes to without loss is read so: what is said beside it (of its text, its times, its memory), and, for
those who look at a job that they can't draw, its order.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from serve.domain.orders import ImageRequest
from serve.domain.text import Note
from serve.errors import BackendUnavailable

log = logging.getLogger(__name__)

T = TypeVar("T")
D = TypeVar("D")

REQUEST = TypeAdapter(ImageRequest)
NEWER = Note(
    field="request",
    code="newer_release",
    message="ordered through a newer release of the server; what this one does not know of the order is left out",
)
_ASK_AGAIN_S = 2.0


def beside(adapter: TypeAdapter[T], data: bytes | None, default: D) -> T | D:
    """`default` where there is nothing, and where it has another release's form."""
    if not data:
        return default
    try:
        return adapter.validate_json(data)
    except ValidationError as error:
        log.debug("a %s has the form of another release", error.title)
        return default


def readable(adapter: TypeAdapter[T], told: Iterable[bytes]) -> list[T]:
    """Those that this release can read."""
    return [each for data in told if (each := beside(adapter, data, None)) is not None]


def order(data: bytes, newer: bool) -> ImageRequest:
    """The order of a record. Of one with a `newer` schema, what this release can't read has its default; where that
    does not do, BackendUnavailable sends the client on to a process of the newer release."""
    try:
        return REQUEST.validate_json(data)
    except ValidationError as error:
        if not newer:
            raise
        left: dict[str, Any] = json.loads(data)
        for each in error.errors(include_url=False, include_input=False):
            left.pop(str(each["loc"][0]), None)
    try:
        return REQUEST.validate_python(left)
    except ValidationError:
        told = "the job was ordered through a newer release of the server, which this process can't read"
        raise BackendUnavailable(told, "id", _ASK_AGAIN_S) from None
