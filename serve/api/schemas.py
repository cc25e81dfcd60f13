"""The JSON of the native API. Types and unknown fields are checked here; limits and the model's grid in the service."""

from __future__ import annotations

import base64
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from serve import __version__
from serve.api.dialects import ErrorDetail
from serve.api.fields import FiniteNumber, Name, Schema, Text
from serve.api.prompt_schemas import PromptOrder
from serve.domain.jobs import Job, JobError, JobEvent, JobState, MemoryReport, Timings, WebhookState
from serve.domain.orders import ImageRequest, MaskedContent, Priority, ResizeMode
from serve.domain.text import CacheReport, LongPrompt, Note, Syntax, TokenCount, Truncation, Weighting
from serve.results.keys import reference


class JobOrder(PromptOrder):
    """What to draw. Everything but the prompt has a default; an unknown field is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"prompt": "a red circle"}]})

    model: Name | None = None
    """One of `GET /v1/models`; by default the first that draws."""
    width: int | None = None
    """Pixels; by default the image's own size, rounded down to the model's grid, or the model's."""
    height: int | None = None
    """Pixels; by default the image's own size, rounded down to the model's grid, or the model's."""
    aspect_ratio: Name | None = None
    """In place of `width` and `height`: one of the model's `aspect_ratios`, such as `16:9`, or `Auto`: the image's."""
    round_size: bool = False
    """Take the nearest good size where `width` or `height` is off the model's grid, instead of refusing."""
    num_inference_steps: int | None = None
    """Denoising steps; by default what the model is made for."""
    guidance_scale: FiniteNumber | None = None
    """Weight of the prompt (classifier-free guidance); at or below 1 there is none, and no negative prompt. FLUX.1 dev
    reads it as an input. By default what the model is made for."""
    true_cfg_scale: FiniteNumber | None = None
    """Classifier-free guidance of a model that reads `guidance_scale` as an input (FLUX); by default 1, none."""
    seed: int | None = None
    """Fixes the picture; by default random. Image i uses `seed + i`."""
    num_images: int = 1
    """How many pictures to draw."""
    scheduler: Name | None = None
    """Sampler, one of the model's `schedulers`; by default the model's own."""
    image: str | None = None
    """What to start from: a PNG, JPEG or WebP file as a data URL or in base64, or a picture of another job as
    `<job id>/0` (`<job id>/image`: what that one started from)."""
    mask: str | None = None
    """What to repaint of the image: white is drawn anew, black stays. As large as the image; written like it."""
    strength: FiniteNumber | None = None
    """Share of the steps that the image goes through, above 0 and at most 1: at 1 little of it is left."""
    mask_blur: FiniteNumber | None = None
    """0 to 64: what the mask leaves is the image's own pixels, and the edge fades over so many (0 is a hard edge). By
    default all pixels are decoded ones, as in diffusers."""
    mask_invert: bool = False
    """Repaint what is black in the mask, and keep what is white."""
    padding_mask_crop: int | None = None
    """Draw only the mask's surroundings, so many pixels beyond it, at the size of the order, and put them back: the
    answer is the whole picture in its own size, with a `mask_blur` of 4 unless another is said. For details of a large
    picture. As in diffusers; A1111's "only masked"."""
    masked_content: Annotated[MaskedContent, Field(strict=False)] = MaskedContent.ORIGINAL
    """What stands under the mask at first, which a `strength` below 1 leaves something of: `original`, what the picture
    has there; `fill`, the colours around it; `latent_noise`; `latent_nothing`."""
    resize_mode: Annotated[ResizeMode, Field(strict=False)] = ResizeMode.STRETCH
    """How image and mask come to the size that is drawn: `stretch`; `crop` fills it in their own ratio and cuts what
    juts out; `fill` shows all of them and repeats their edges."""
    variation_seed: int | None = None
    """The seed whose noise `variation_strength` mixes in; by default random. Image i uses `variation_seed + i`, and all
    of them `seed`."""
    variation_strength: FiniteNumber = 0.0
    """0 to 1: how far from the picture of `seed` to that of `variation_seed`."""
    clip_skip: int | None = None
    """Layers of CLIP to leave out at its end, as in diffusers: 1 is what A1111 calls 2."""
    use_t5: bool = True
    """False leaves out the T5 of a model that can do without it (SD 3)."""
    preview_every: int = 0
    """Send a small preview among the job's events after every so many steps; 0 for none."""
    step_cache: FiniteNumber = 0.0
    """Above 0, up to 1: reuse predictions between steps that hardly differ. The image is labelled approximate."""
    tiny_vae: bool = False
    """Decode with the placement's small VAE, faster and less exactly. The image is labelled approximate."""
    output_format: Name = "png"
    """The file of each picture: `png`, `jpeg` or `webp`."""
    output_compression: int | None = None
    """Quality of a `jpeg` or `webp`, 0 to 100; by default 90."""
    bit_depth: int = 8
    """Bits a channel: 8, or 16 in a `png`."""
    priority: Annotated[Priority, Field(strict=False)] = Priority.INTERACTIVE
    """`interactive` goes before `batch` among your own jobs; beside other callers it changes nothing."""
    webhook: Annotated[Text, Field(max_length=2048)] | None = None
    """A URL that is told when the job has ended, on a host that the operator allows."""


class CompleteOrder(Schema):
    """An order with every default filled in. What it starts from is named as a reference."""

    prompt: str
    """In words, with variables filled in and choices made."""
    negative_prompt: str
    prompt_syntax: Syntax
    prompt_weighting: Weighting
    long_prompt: LongPrompt
    model: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    true_cfg_scale: float | None
    seed: int
    num_images: int
    scheduler: str | None
    image: str | None
    mask: str | None
    strength: float | None
    mask_blur: float | None
    padding_mask_crop: int | None
    masked_content: MaskedContent
    variation_seed: int | None
    variation_strength: float
    clip_skip: int | None
    use_t5: bool
    preview_every: int
    step_cache: float
    tiny_vae: bool
    output_format: str
    output_compression: int | None
    bit_depth: int

    @classmethod
    def of(cls, request: ImageRequest) -> CompleteOrder:
        same = {name: getattr(request, name) for name in cls.model_fields if name not in ("image", "mask")}
        keys = {"image": request.image, "mask": request.mask}
        return cls(**same, **{field: key and reference(key) for field, key in keys.items()})


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
    priority: Priority
    position: int | None
    """1 for the job of its model that starts next; null once it has started, and in lists."""
    eta_s: float | None
    """Predicted seconds until it ends; null once it has, and in lists."""
    cost_ms: int
    """Predicted share of one replica's time."""
    step: int
    """Denoising steps done."""
    steps: int
    """Denoising steps in all."""
    attempt: int
    """How many times the job was started: over 1 after a worker was lost."""
    request: CompleteOrder
    """The order with every default filled in; posting it again repeats the pictures."""
    template: str | None
    """Which of the server's prompts it was ordered with."""
    arm: str | None
    """Which of the template's texts it got; null where that has one alone."""
    tokens: tuple[TokenCount, ...]
    """Tokens of the text by field and encoder, and the rows (`chunks`) that they take. `unknown` ones, among those
    used, stand for text that is in no vocabulary."""
    truncated: tuple[Truncation, ...]
    """Text that did not fit into the model's prompt and was left out."""
    notes: tuple[Note, ...]
    """What of the text was read otherwise than it was written, such as weights that don't add up to 1."""
    cache: CacheReport | None
    """Where the text's embeddings came from; null until that is known."""
    timings: Timings
    images: tuple[ImageView, ...]
    approximate: tuple[str, ...]
    """What kept the images from being exact: `step_cache`, `tiny_vae`, `tiled_vae`, `int8`, `int4`."""
    memory: MemoryReport | None
    """How the job fared for the memory of its cards; null until an attempt has drawn it or run out of memory."""
    error: JobError | None
    webhook_state: WebhookState | None
    """How far telling the order's `webhook` has come; null before the end, and without one."""
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
        others = {"images", "request", "template", "arm"}
        same = {name: getattr(job, name) for name in cls.model_fields if name not in others}
        request = job.request
        return cls(**same, images=images, request=CompleteOrder.of(request), template=request.template, arm=request.arm)


class EventView(Schema):
    """The data of an event `state` or `step`."""

    state: JobState
    step: int
    steps: int
    attempt: int
    """How many times the job had been started by then."""

    @classmethod
    def of(cls, event: JobEvent) -> EventView:
        return cls(state=event.state, step=event.step, steps=event.steps, attempt=event.attempt)


class PreviewView(Schema):
    """The data of an event `preview`: image `index` of the job after `step` of `steps`."""

    state: JobState
    step: int
    steps: int
    index: int
    image: str
    """A small JPEG as a data URL."""

    @classmethod
    def of(cls, event: JobEvent) -> PreviewView:
        image = "data:image/jpeg;base64," + base64.b64encode(event.preview or b"").decode()
        return cls(state=event.state, step=event.step, steps=event.steps, index=event.index or 0, image=image)


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
    version: str = Field(__version__, description="Of the server.")
