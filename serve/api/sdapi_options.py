"""A1111's dialect: the options, of which each API key has its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body

from serve.api.auth import Generates
from serve.api.errors import documented
from serve.api.fields import Schema
from serve.api.parts import Service

router = APIRouter()
"""Part of `serve.api.sdapi.router`, which asks for the key."""

_ORDER = {"sd_model_checkpoint": "shapes", "CLIP_stop_at_last_layers": 1, "samples_format": "png"}


class A1111Options(Schema):
    """The options that mean something here. Each can be set, but for `sd_vae` and `sd_checkpoint_hash`; A1111's others
    are passed over when they are set."""

    sd_model_checkpoint: str
    """Title of the model that draws; empty on a server that draws nothing."""
    sd_checkpoint_hash: Literal[""] = ""
    sd_vae: Literal["Automatic"] = "Automatic"
    CLIP_stop_at_last_layers: int
    """A1111's clip skip, 1 to 12: 1 skips nothing."""
    samples_format: Literal["png", "jpeg", "webp"]
    """Format of the pictures in an answer; `jpg` is read too."""
    jpeg_quality: int
    """Quality of jpeg and webp, 1 to 100."""
    show_progress_every_n_steps: int
    """A preview comes every so many steps; 0 and -1: none."""
    live_previews_enable: bool
    """Whether previews are made at all."""


@router.get("/sdapi/v1/options")
async def a1111_options(service: Service, caller: Generates) -> A1111Options:
    """What the caller's orders go by where they say nothing themselves."""
    options = await service.options(caller)
    first = next((info.id for info in service.models()), "")
    return A1111Options(
        sd_model_checkpoint=options.sd_model_checkpoint or first,
        CLIP_stop_at_last_layers=options.CLIP_stop_at_last_layers,
        samples_format=options.samples_format,
        jpeg_quality=options.jpeg_quality,
        show_progress_every_n_steps=options.show_progress_every_n_steps,
        live_previews_enable=options.live_previews_enable,
    )


@router.post("/sdapi/v1/options", responses=documented(404))
async def a1111_set_options(
    given: Annotated[dict[str, Any], Body(examples=[_ORDER])], service: Service, caller: Generates
) -> None:
    """Set options for all orders of this API key to come, until 30 days pass in which none is set. null sets
    one back."""
    await service.set_options(caller, given)
