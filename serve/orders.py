"""An image order as a client writes it -> the complete request that is logged and can be repeated."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TypeVar

from serve.domain import ImageRequest
from serve.errors import InvalidRequest, ModelNotFound
from serve.models import Denoiser, ModelFolder
from serve.prompts.grammar import parse
from serve.settings import LimitSettings

MAX_SEED = 2**32 - 1
"""Seeds fit into 32 bits, so that every client language can hold them."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewImage:
    """An image order as a client writes it; None takes the model's or the server's default (a random seed)."""

    prompt: str
    negative_prompt: str = ""
    model: str | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    num_images: int = 1
    clip_skip: int | None = None
    salt: str = ""


def complete(new: NewImage, model: ModelFolder, limits: LimitSettings) -> ImageRequest:
    """Every default filled in, every limit checked, the seed fixed. Raises InvalidRequest or ModelNotFound."""
    if new.model is not None and new.model != model.name:
        raise ModelNotFound(f"model {new.model!r} is not served here; this server draws with {model.name!r}", "model")
    if model.denoiser is None:
        raise ModelNotFound("this server only encodes text (diffusion.replicas is 0); see POST /v1/embeddings", "model")
    check_prompts(new.prompt, new.negative_prompt, limits)
    parse(new.negative_prompt, "negative_prompt")  # also where, without guidance, nobody will read it
    steps = _default(new.num_inference_steps, limits.default_num_inference_steps)
    guidance = _default(new.guidance_scale, limits.default_guidance_scale)
    seed = secrets.randbelow(MAX_SEED + 1) if new.seed is None else new.seed
    within("num_inference_steps", steps, 1, limits.max_num_inference_steps)
    within("guidance_scale", guidance, 0.0, limits.max_guidance_scale)
    within("num_images", new.num_images, 1, limits.max_num_images)
    within("seed", seed, 0, MAX_SEED)
    return ImageRequest(
        model=model.name,
        prompt=new.prompt,
        negative_prompt=new.negative_prompt,
        width=_side("width", _default(new.width, model.denoiser.default_width), model.denoiser, limits),
        height=_side("height", _default(new.height, model.denoiser.default_height), model.denoiser, limits),
        num_inference_steps=steps,
        guidance_scale=float(guidance),
        seed=seed,
        num_images=new.num_images,
        clip_skip=new.clip_skip,
        salt=new.salt,
    )


def check_prompts(prompt: str, negative_prompt: str | None, limits: LimitSettings) -> None:
    """Raises InvalidRequest for a prompt that is empty and for either one that is too long."""
    if not prompt.strip():
        raise InvalidRequest("prompt is empty", "prompt")
    for field, text in (("prompt", prompt), ("negative_prompt", negative_prompt or "")):
        if len(text.encode()) > limits.max_prompt_bytes:
            raise InvalidRequest(f"{field} is longer than {limits.max_prompt_bytes} bytes", field)


def within(field: str, value: float, least: float, most: float) -> None:
    """Raises InvalidRequest that names `field`."""
    if not least <= value <= most:  # also refuses NaN
        raise InvalidRequest(f"{field} must be between {least} and {most}", field)


def _side(field: str, pixels: int, denoiser: Denoiser, limits: LimitSettings) -> int:
    grid = denoiser.size_multiple
    within(field, pixels, grid, limits.max_side)
    if pixels % grid:
        below = pixels - pixels % grid
        raise InvalidRequest(
            f"{field} {pixels} is not a multiple of {grid}; the nearest are {below} and {below + grid}", field
        )
    return pixels


def _default(value: T | None, default: T) -> T:
    return default if value is None else value
