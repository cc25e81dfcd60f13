"""Captions in the native dialect: what a picture shows, in words."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import ConfigDict

from serve.api.auth import Uses
from serve.api.errors import documented
from serve.api.fields import Name, Schema, Text
from serve.api.parts import GUARDED, Captions
from serve.captions.service import NewCaption
from serve.service import NotOffered

router = APIRouter(prefix="/v1", tags=["native"], responses=documented(401, 403, 503), dependencies=GUARDED)


class CaptionOrder(Schema):
    """A picture to describe. Everything but the image has a default; an unknown field is refused."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"image": "6f1b0c52a4e94d1f9d0c1a2b3c4d5e6f/0"}]}
    )

    image: str
    """PNG, JPEG or WebP in base64, or as a data URL; or a picture that the server keeps: `<job id>/0`."""
    prompt: Text | None = None
    """What the model is told: a question, where it chats; the beginning of the caption, where it only captions. By
    default what `captions.prompt` says."""
    max_new_tokens: int | None = None
    """Most tokens of the caption; by default, and at most, `captions.max_new_tokens`."""
    model: Name | None = None
    """The model that describes; there is one."""


class CaptionView(Schema):
    """What the model says."""

    model: str
    """The model that described the picture."""
    caption: str
    tokens: int
    """Tokens of the caption."""


@router.post("/captions", responses=documented(400, 404, 413, 415, 422))
async def create_caption(order: CaptionOrder, captions: Captions, caller: Uses) -> CaptionView:
    """Describe a picture. The same picture and prompt give the same words. Only where `captions.source` names a model.

    Whoever hangs up takes the picture out of the queue.
    """
    if captions is None:
        raise NotOffered("this server describes no pictures (captions.source)")
    told = await captions.caption(NewCaption(**order.model_dump()), caller)
    return CaptionView(model=told.model, caption=told.caption, tokens=told.tokens)
