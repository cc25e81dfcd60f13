"""A1111's dialect: what a picture says of how it was made, and what is in one."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from pydantic import ConfigDict

from serve.api.auth import Uses
from serve.api.errors import documented
from serve.api.fields import Schema
from serve.api.parts import Captions, Limits
from serve.captions.service import NewCaption
from serve.errors import ModelNotFound
from serve.images import inspect, written_file
from serve.results.infotext import read_text
from serve.results.notes import Notes, read_notes
from serve.settings.orders import LimitSettings

router = APIRouter()
"""Part of `serve.api.sdapi.router`, which asks for the key."""

_PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAIAQAAAADsdIMmAAAALXRFWHRwYXJhbWV0ZXJzAGEgY2F0ClN0ZXBzOiA0LCBTZWVkOiAxLCBTaXplOiA4eDgm"
    "AIJoAAAAC0lEQVR4nGNgQAUAABAAATm9j2UAAAAASUVORK5CYII="
)
"""A black one, of which is said that it is a cat."""


_ANY = "clip"
"""What A1111's clients call the one that describes."""


class A1111PngInfo(Schema):
    """A picture to read."""

    model_config = ConfigDict(use_attribute_docstrings=True, json_schema_extra={"examples": [{"image": _PICTURE}]})

    image: str
    """PNG, JPEG or WebP in base64, or as a data URL."""


class A1111Info(Schema):
    """What the picture says of itself."""

    info: str
    """A1111's text, as it stands in the file; empty where there is none."""
    items: dict[str, str]
    """The file's other texts, by their names."""
    parameters: dict[str, str]
    """What `info` says, by A1111's labels; a size also in parts (`Size-1`, `Size-2`)."""


class A1111Interrogate(Schema):
    """A picture to describe."""

    model_config = ConfigDict(
        use_attribute_docstrings=True, json_schema_extra={"examples": [{"image": _PICTURE, "model": "clip"}]}
    )

    image: str = ""
    """PNG, JPEG or WebP in base64, or as a data URL."""
    model: str = "clip"
    """Who is to describe it: `clip`, whatever the model here is, or its own name."""


class A1111Caption(Schema):
    """What it shows."""

    caption: str


@router.post("/sdapi/v1/png-info")
async def a1111_png_info(order: A1111PngInfo, limits: Limits, caller: Uses) -> A1111Info:
    """Read how a picture was made: one of ours, of A1111, or of what writes as they do."""
    notes = await asyncio.to_thread(_read, order.image.strip(), limits)
    return A1111Info(info=notes.info, items=notes.items, parameters=read_text(notes.info) if notes.info else {})


@router.post("/sdapi/v1/interrogate", responses=documented(404))
async def a1111_interrogate(order: A1111Interrogate, captions: Captions, caller: Uses) -> A1111Caption:
    """Describe a picture. Where no model here does (`captions.source`) this is a 404, as of A1111 for a model that it
    has not; so it is for `deepdanbooru`, whose tags no other model knows."""
    if captions is None:
        raise ModelNotFound("model: this server has no model that describes pictures", "model")
    model = None if order.model == _ANY else order.model
    told = await captions.caption(NewCaption(image=order.image.strip(), model=model), caller)
    return A1111Caption(caption=told.caption)


def _read(image: str, limits: LimitSettings) -> Notes:
    data = written_file("image", image, limits)
    inspect("image", data, limits)
    return read_notes(data)
