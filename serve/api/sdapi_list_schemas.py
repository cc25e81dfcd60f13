"""The JSON of A1111's lists, with the fields that its clients read:
https://github.com/AUTOMATIC1111/stable-diffusion-webui, modules/api/models.py."""

from __future__ import annotations

from typing import Any

from serve.api.fields import Schema


class A1111Model(Schema):
    """A model that images can be ordered from. There are no files to name here: all three names are the model's."""

    title: str
    """What `sd_model_checkpoint` takes."""
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


class A1111Sampler(Schema):
    """A sampler that orders name in `sampler_name`."""

    name: str
    aliases: tuple[str, ...]
    options: dict[str, str]
    """`scheduler`: what `Automatic` comes to; `second_order`: each step asks the model twice."""


class A1111Scheduler(Schema):
    """A schedule type that orders name in `scheduler`, by its name or its label."""

    name: str
    label: str
    aliases: tuple[str, ...] | None = None
    default_rho: float = -1.0
    need_inner_model: bool = False


class A1111Upscaler(Schema):
    """What the second pass of a hires fix enlarges the first one's picture with."""

    name: str
    model_name: str | None = None
    model_path: str | None = None
    model_url: str | None = None
    scale: float


class A1111Style(Schema):
    """A style: a prompt of the server's own, around or behind that of an order."""

    name: str
    prompt: str
    negative_prompt: str


class A1111Embedding(Schema):
    """A learned concept. What is not known of it here is null."""

    step: int | None = None
    sd_checkpoint: str | None = None
    sd_checkpoint_name: str | None = None
    shape: int
    """Numbers in one of its vectors, for the model's first text encoder that reads it; 0 of one that none does."""
    vectors: int
    """How many vectors it has there: tokens of the prompt that it takes."""


class A1111Embeddings(Schema):
    """The learned concepts, by name: those that the caller's model can use, and those that it can't."""

    loaded: dict[str, A1111Embedding]
    skipped: dict[str, A1111Embedding]


class A1111Scripts(Schema):
    """Titles of scripts. There are none."""

    txt2img: tuple[str, ...] = ()
    img2img: tuple[str, ...] = ()


class A1111Memory(Schema):
    """Bytes: `ram` of the machine that answers, `cuda` of all GPUs that draw."""

    ram: dict[str, int]
    cuda: dict[str, Any]
