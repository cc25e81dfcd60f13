"""The JSON of models: what each can be asked for, and how fast it steps here."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict

from serve.api.fields import Name, Schema
from serve.domain.orders import Task
from serve.models.denoiser import Guidance
from serve.offers import StepTime


class ConceptView(Schema):
    """A learned concept (textual inversion), which a prompt uses as `<name>`."""

    name: str
    vectors: dict[str, int]
    """How many vectors it has for each text encoder of the model, by role."""
    fault: str | None
    """Why the model can't use it; null where it can."""


class ModelView(Schema):
    """A served model, what it can be asked for, and what an order to it gets by default. Sizes are pixels.

    All but the first seven are null or empty for a model whose text alone is served (`POST /v1/embeddings`).
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    """When this server's copy of it was made, in Unix seconds."""
    owned_by: Literal["tandem"] = "tandem"
    """There for OpenAI's clients."""
    family: str
    images: bool
    """Whether jobs may name it."""
    concepts: tuple[ConceptView, ...] = ()
    """What its prompts may use as `<name>`."""
    tasks: tuple[Task, ...] = ()
    """`txt2img`: text alone; `img2img`: an image; `inpaint`: an image and a mask."""
    default_width: int | None = None
    default_height: int | None = None
    size_multiple: int | None = None
    """Widths and heights are multiples of it."""
    max_side: int | None = None
    """Longest width or height."""
    max_pixels: int | None = None
    """Most pixels (width x height) that a GPU here holds."""
    aspect_ratios: dict[str, tuple[int, int]] = {}
    """Width and height by the name that `aspect_ratio` takes."""
    schedulers: tuple[str, ...] = ()
    """The names that `scheduler` takes."""
    guidance: Guidance | None = None
    """What `guidance_scale` is to the model: the weight of classifier-free guidance, an input, or nothing."""
    default_num_inference_steps: int | None = None
    quality_steps: dict[str, int] = {}
    """Denoising steps by the `quality` of OpenAI's dialect; `medium` are the model's own."""
    default_guidance_scale: float | None = None
    default_strength: float | None = None
    step_cache: bool | None = None
    """Whether orders may ask for it."""
    tiny_vae: bool | None = None
    """Whether orders may ask for it."""


class BenchmarkOrder(Schema):
    """What to time. Every field has a default; an unknown field is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"num_inference_steps": 5}]})

    model: Name | None = None
    """One of `GET /v1/models` that draws; by default the first."""
    width: int | None = None
    """Pixels; by default the model's own size."""
    height: int | None = None
    """Pixels; by default the model's own size."""
    num_inference_steps: int = 5
    """Steps to time for each batch size."""


class BenchmarkReport(Schema):
    """By placement, how long a step takes with 1, 2, 4, ... entries, on one replica, between the steps of its jobs."""

    model: str
    width: int
    height: int
    steps: int
    placements: dict[str, tuple[StepTime, ...]]


class ModelList(Schema):
    object: Literal["list"] = "list"
    data: tuple[ModelView, ...]
