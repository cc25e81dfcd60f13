"""The fields of OpenAI's Images API -> an order of ours.

https://platform.openai.com/docs/api-reference/images. What clients give as `extra_body` comes as further fields at the
top: they are the native ones, by their names. What is none of either is ignored, and null is as good as left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serve.api.fields import Schema, Text
from serve.api.schemas import JobOrder
from serve.callers import Caller
from serve.errors import InvalidRequest
from serve.orders import NewImage

MOST_PARTIAL = 3

_MANY = 1_000_000
"""More steps than any order may have: those are not checked yet."""
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_AUTO = "auto"
_SAME: Mapping[str | None, str] = {None: "medium", _AUTO: "medium", "standard": "medium", "hd": "high"}
StepsOf = Callable[[str | None], Mapping[str, int]]
"""Denoising steps by quality of a model, by default the first."""

_NATIVE = set(JobOrder.model_fields)


class GenerationOrder(JobOrder):
    """What to draw, by OpenAI's fields, and by every field of the native order beside them. What is unknown is
    ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)

    n: int | None = None
    """How many pictures to draw; 1 by default."""
    size: Annotated[Text, Field(max_length=32)] | None = None
    """`WIDTHxHEIGHT` in pixels, or `auto` (default): the image's own size, or the model's."""
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = None
    """How many steps, where `num_inference_steps` does not say it: the model's `quality_steps`. `auto` (default) and
    `standard` are `medium`, `hd` is `high`."""
    response_format: Literal["b64_json", "url"] | None = None
    """Whether the answer has the files (default), or addresses of them."""
    background: Literal["auto", "opaque", "transparent"] | None = None
    """Pictures are opaque: `transparent` is refused."""
    stream: bool | None = None
    """Answer with Server-Sent Events."""
    partial_images: Annotated[int, Field(ge=0, le=MOST_PARTIAL)] | None = None
    """Of a stream: how many previews of each picture to send at most, evenly over its steps."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class ImageInput(Schema):
    """A picture to edit."""

    image_url: str | None = None
    """A PNG, JPEG or WebP file as a data URL, or a picture of another job as `<job id>/0`. Addresses are not
    fetched."""


def _url(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if not isinstance(value.get("image_url"), str):
        raise PydanticCustomError("image_url", "send an image_url: a data URL (there are no file ids here)")
    return value["image_url"]


def _only_url(value: Any) -> Any:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise PydanticCustomError("images", "must be a list of objects with an image_url")
    if len(value) != 1:
        raise PydanticCustomError("one_image", "one picture is edited at a time; {count} came", {"count": len(value)})
    return _url(value[0])


class EditOrder(GenerationOrder):
    """What to make of a picture. As JSON it comes as `images`, with one entry; in a form as the file `image`."""

    images: Annotated[str | None, BeforeValidator(_only_url, json_schema_input_type=list[ImageInput])] = None
    """The picture to edit: a list of one."""
    mask: Annotated[str | None, BeforeValidator(_url, json_schema_input_type=ImageInput | str)] = None
    """What is transparent here is drawn anew, all else stays as it is. As large as the image. Without it the image's
    own transparency is the mask, and all of an opaque image is drawn over."""


@dataclass(frozen=True, slots=True)
class Answering:
    """What is left of an order while its client waits. `kind` begins the names of a stream's events, `partial` is how
    many previews of each picture are wanted at most, `url` whether addresses instead of files; `prompt` was written."""

    kind: str
    prompt: object
    quality: str
    url: bool
    stream: bool
    partial: int


@dataclass(frozen=True, slots=True)
class Asked:
    """An order read. `names` are the dialect's words for native fields that a refusal may name."""

    new: NewImage
    names: Mapping[str, str]
    answering: Answering


def asked(order: GenerationOrder, steps_of: StepsOf, caller: Caller, kind: str) -> Asked:
    """Raises InvalidRequest, and what `steps_of` raises."""
    if order.background == "transparent":
        raise InvalidRequest("background: pictures are opaque here; leave it to auto", "background")
    if order.stream and order.response_format == "url":
        raise InvalidRequest("response_format: a stream holds the files; leave it to b64_json", "response_format")
    quality = _SAME.get(order.quality, order.quality or "")
    steps = order.num_inference_steps
    if steps is None:
        steps = steps_of(order.model)[quality]
    partial = order.partial_images or 0 if order.stream else 0
    native = order.model_dump(by_alias=True, include=_NATIVE)
    native |= _size(order) | {"num_inference_steps": steps, "salt": caller.salt}
    native |= {} if order.n is None else {"num_images": order.n}
    native |= {"preview_every": _every(order, steps, partial)} if order.stream else {}
    url = order.response_format == "url"
    return Asked(
        NewImage(**native), _names(order), Answering(kind, order.prompt, quality, url, bool(order.stream), partial)
    )


def _size(order: GenerationOrder) -> dict[str, int]:
    if order.size in (None, _AUTO):
        return {}
    read = _SIZE.fullmatch(order.size or "")
    if read is None:
        raise InvalidRequest("size must be WIDTHxHEIGHT in pixels, such as 1024x768, or auto", "size")
    if order.width is not None or order.height is not None:
        raise InvalidRequest("size stands in place of width and height; send one or the other", "size")
    return {"width": int(read[1]), "height": int(read[2])}


def _every(order: GenerationOrder, steps: int, partial: int) -> int:
    """Steps from one preview to the next, so that one is at hand whenever a partial picture is due."""
    if not partial:
        return 0
    share = 1.0 if order.strength is None else min(max(order.strength, 0.0), 1.0)
    return max(1, int(min(steps, _MANY) * share) // (partial + 1))


def _names(order: GenerationOrder) -> dict[str, str]:
    names = {"image": "images"} if isinstance(order, EditOrder) and order.images is not None else {}
    if order.n is not None:
        names["num_images"] = "n"
    if order.size not in (None, _AUTO):
        names |= {"width": "size", "height": "size"}
    if order.num_inference_steps is None and order.quality is not None:
        names["num_inference_steps"] = "quality"
    return names
