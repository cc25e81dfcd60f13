"""The JSON of the native API. Types and unknown fields are checked here; limits and the model's grid in the service."""

from __future__ import annotations

import unicodedata
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from serve.api.errors import ErrorDetail
from serve.domain import CacheReport, Job, JobError, JobEvent, JobState, Timings, Truncation


def _printable(text: str) -> str:
    # Cs: half of a surrogate pair, which JSON can spell (\ud800) and no encoding can write.
    if any(unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n\r" for character in text):
        raise PydanticCustomError("control_character", "must not hold control characters or lone surrogates")
    return text


Text = Annotated[str, AfterValidator(_printable)]
FiniteNumber = Annotated[float, Field(allow_inf_nan=False)]


class Schema(BaseModel):
    """Descriptions are the docstrings, so that the API's page says what the code says."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class JobOrder(Schema):
    """What to draw. Everything but the prompt has a default; an unknown field is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"prompt": "a red circle"}]})

    prompt: Text
    """What the picture shows. A1111 weights: `(red:1.3)`, `(red)`, `[red]`."""
    negative_prompt: Text = ""
    """What it must not show."""
    model: Annotated[Text, Field(max_length=256)] | None = None
    """One of `GET /v1/models`; by default the one that is served."""
    width: int | None = None
    """Pixels; by default the model's own size."""
    height: int | None = None
    """Pixels; by default the model's own size."""
    num_inference_steps: int | None = None
    """Denoising steps."""
    guidance_scale: FiniteNumber | None = None
    """Weight of the prompt (classifier-free guidance); at or below 1 there is none, and no negative prompt."""
    seed: int | None = None
    """Fixes the picture; by default random. Image i uses `seed + i`."""
    num_images: int = 1
    """How many pictures to draw."""
    clip_skip: int | None = None
    """Layers of CLIP to leave out at its end, as in diffusers: 1 is what A1111 calls 2."""


class CompleteOrder(Schema):
    """An order with every default filled in."""

    prompt: str
    negative_prompt: str
    model: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    num_images: int
    clip_skip: int | None


class ImageView(Schema):
    """A finished image. `bytes` is the size of the file at `url`."""

    index: int
    url: str
    seed: int
    width: int
    height: int
    content_type: str
    bytes: int


class JobView(Schema):
    """A job at one moment. Times are Unix seconds."""

    id: str
    state: JobState
    position: int | None
    """1 for the job that starts next; null once it has started."""
    step: int
    """Denoising steps done."""
    steps: int
    """Denoising steps in all."""
    attempt: int
    """How many times the job was started: over 1 after a worker was lost."""
    request: CompleteOrder
    """The order with every default filled in; posting it again repeats the pictures."""
    truncated: tuple[Truncation, ...]
    """Text that did not fit into the model's prompt and was left out."""
    cache: CacheReport | None
    """Where the text's embeddings came from; null until that is known."""
    timings: Timings
    images: tuple[ImageView, ...]
    error: JobError | None
    created_at: float
    started_at: float | None
    finished_at: float | None

    @classmethod
    def of(cls, job: Job, root: str) -> JobView:
        """`root` is the path under which the server is mounted, without a slash at its end."""
        images = tuple(
            ImageView(
                index=ref.index,
                url=f"{root}/v1/images/{job.id}/{ref.index}",
                seed=ref.seed,
                width=ref.width,
                height=ref.height,
                content_type=ref.content_type,
                bytes=ref.bytes,
            )
            for ref in job.images
        )
        request = CompleteOrder(**{name: getattr(job.request, name) for name in CompleteOrder.model_fields})
        same = {name: getattr(job, name) for name in cls.model_fields if name not in ("images", "request")}
        return cls(**same, images=images, request=request)


class EventView(Schema):
    """The data of an event `state` or `step`."""

    state: JobState
    step: int
    steps: int

    @classmethod
    def of(cls, event: JobEvent) -> EventView:
        return cls(state=event.state, step=event.step, steps=event.steps)


class ModelView(Schema):
    """A served model, and what an order to it gets by default. Sizes are pixels, multiples of `size_multiple`.

    The defaults are null for a model whose text alone is served (`POST /v1/embeddings`).
    """

    id: str
    object: Literal["model"] = "model"
    family: str
    images: bool
    """Whether jobs may name it."""
    default_width: int | None = None
    default_height: int | None = None
    size_multiple: int | None = None
    default_num_inference_steps: int | None = None
    default_guidance_scale: float | None = None


class ModelList(Schema):
    object: Literal["list"] = "list"
    data: tuple[ModelView, ...]


class PoolView(Schema):
    ready: bool
    detail: str


class Readiness(Schema):
    """`ready` when every pool is; `error`, in the shape of every error, when one is not."""

    ready: bool
    pools: dict[str, PoolView]
    error: ErrorDetail | None = None


class Health(Schema):
    status: Literal["ok"] = "ok"
