"""What can be ordered, typed: the fields of the API's orders, as keyword arguments or as dictionaries.

A field that is left out, or None, takes the server's default.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NotRequired, Protocol, TypeAlias, TypedDict, runtime_checkable


class Piece(TypedDict):
    """A prompt and its weight beside the others of a blend."""

    text: str
    weight: NotRequired[float]


Prompt: TypeAlias = str | Sequence[Piece]
"""Words, or several prompts that are blended."""

Entry = TypedDict(
    "Entry",
    {
        "from": float,
        "to": NotRequired[float | None],
        "prompt": Prompt,
        "ramp": NotRequired[bool],
    },
)
"""Another prompt from a step until before another; below 1 and written with a point, a share of the steps."""


class Savable(Protocol):
    """An image of Pillow's."""

    def save(self, fp: IO[bytes], format: str) -> None: ...


@runtime_checkable
class Referable(Protocol):
    """A picture that the server keeps."""

    @property
    def reference(self) -> str:
        """`<job id>/<index>`."""
        ...


PictureSource: TypeAlias = Path | bytes | Savable | Referable | str
"""What to start from: a file by its path, the bytes of one, an image of Pillow's, a picture that was drawn before; or
text as the API takes it: a data URL, base64, `<job id>/0`."""


class PromptOptions(TypedDict, total=False):
    """How a prompt is read, whatever is wanted of it."""

    negative_prompt: Prompt | None
    schedule: Sequence[Entry] | None
    prompt_syntax: Literal["a1111", "compel", "plain"] | None
    prompt_weighting: Literal["a1111", "compel", "multiply"] | None
    long_prompt: Literal["chunk", "window", "hierarchical", "head", "tail", "error"] | None
    variables: Mapping[str, str] | None
    template: str | None
    arm: str | None
    model: str | None
    seed: int | None
    num_inference_steps: int | None
    width: int | None
    height: int | None
    clip_skip: int | None
    use_t5: bool | None


class Options(PromptOptions, total=False):
    """The fields of `POST /v1/jobs` beside the prompt."""

    aspect_ratio: str | None
    round_size: bool | None
    guidance_scale: float | None
    true_cfg_scale: float | None
    num_images: int | None
    scheduler: str | None
    image: PictureSource | None
    mask: PictureSource | None
    strength: float | None
    mask_blur: float | None
    mask_invert: bool | None
    padding_mask_crop: int | None
    masked_content: Literal["fill", "original", "latent_noise", "latent_nothing"] | None
    resize_mode: Literal["stretch", "crop", "fill"] | None
    variation_seed: int | None
    variation_strength: float | None
    preview_every: int | None
    step_cache: float | None
    tiny_vae: bool | None
    output_format: Literal["png", "jpeg", "webp"] | None
    output_compression: int | None
    bit_depth: Literal[8, 16] | None
    priority: Literal["interactive", "batch"] | None
    webhook: str | None


class Order(Options, total=False):
    """A whole order."""

    prompt: Prompt | None


class TextOptions(PromptOptions, total=False):
    """The fields that `POST /v1/embeddings` and `POST /v1/prompts/analyze` share, beside the prompt."""

    max_sequence_length: int | None


class AnalysisOptions(TextOptions, total=False):
    """The fields of `POST /v1/prompts/analyze` beside the prompt."""

    guidance_scale: float | None
    true_cfg_scale: float | None


class EmbeddingOptions(TextOptions, total=False):
    """The fields of `POST /v1/embeddings` beside the prompt and the form of the answer."""

    step: int | None
    dtype: Literal["float32", "float16", "bfloat16"] | None


class CaptionOptions(TypedDict, total=False):
    """The fields of `POST /v1/captions` beside the image."""

    prompt: str | None
    max_new_tokens: int | None
    model: str | None


def body(order: Mapping[str, Any]) -> bytes:
    """The order as JSON, without what is None."""
    # Not httpx's own, which raises for NaN: the server refuses it and names the field.
    return json.dumps({name: value for name, value in order.items() if value is not None}).encode()


def sent(order: Mapping[str, Any]) -> Mapping[str, Any]:
    """The order with its pictures as text. Raises OSError for one that can't be read."""
    pictures = {field: order[field] for field in ("image", "mask") if order.get(field) is not None}
    return {**order, **{field: _as_text(picture) for field, picture in pictures.items()}}


def _as_text(picture: PictureSource) -> str:
    if isinstance(picture, str):
        return picture
    if isinstance(picture, bytes):
        return _data_url(picture)
    if isinstance(picture, Path):
        return _data_url(picture.read_bytes())
    if isinstance(picture, Referable):
        return picture.reference
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return _data_url(file.getvalue())


def _data_url(file: bytes) -> str:
    """The server looks at the bytes for what they are."""
    return "data:application/octet-stream;base64," + base64.b64encode(file).decode()
