"""The JSON of the A1111 dialect's drawing: orders, answers, progress. Names, kinds and defaults are those of its
`modules/api/models.py` (1.10), but that what is not said is left to the model or the caller's options; unknown fields
are ignored. Null is as good as nothing."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from serve.api.fields import FiniteNumber, Name, Schema, Text

_PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAIAQAAAADsdIMmAAAADUlEQVR4nGP4z8SADAEPcQEOqa2awAAAAABJRU5ErkJggg=="


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "must be a number")
    return value


Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[FiniteNumber, BeforeValidator(_no_bool)]
Switch = Annotated[int, Field(ge=0, le=1)]


class Drawing(BaseModel):
    """What both orders have."""

    model_config = ConfigDict(
        extra="ignore", use_attribute_docstrings=True, json_schema_extra={"examples": [{"prompt": "a red circle"}]}
    )

    prompt: Text | None = ""
    """What the picture shows, in A1111's syntax."""
    negative_prompt: Text | None = ""
    """What it must not show."""
    styles: Annotated[list[Name], Field(max_length=64)] | None = None
    """Names of `GET /sdapi/v1/prompt-styles`, put around the prompts one after another."""
    seed: Whole | None = -1
    """Fixes the pictures; -1 is a random one. Picture i has `seed + i`."""
    subseed: Whole | None = -1
    """Of the noise that is mixed in; -1 is a random one."""
    subseed_strength: Number | None = 0.0
    """Share of that noise, 0 to 1. Above 0 all pictures have `seed`, and picture i `subseed + i`."""
    sampler_name: Name | None = None
    """One of `GET /sdapi/v1/samplers`, an alias of it, or a name with its schedule type, such as `DPM++ 2M Karras`; by
    default the model's own."""
    sampler_index: Name | None = None
    """The older name of `sampler_name`, which goes before it."""
    scheduler: Name | None = None
    """Schedule type: one of `GET /sdapi/v1/schedulers`, by default `Automatic`."""
    batch_size: Whole | None = 1
    """Pictures of a job."""
    n_iter: Whole | None = 1
    """Jobs, one behind another as far as seeds go."""
    steps: Whole | None = None
    """Denoising steps; by default what the model is made for."""
    cfg_scale: Number | None = None
    """Weight of the prompt (classifier-free guidance); by default what the model is made for."""
    distilled_cfg_scale: Number | None = None
    """Forge's: the guidance that FLUX.1 dev reads as an input."""
    width: Whole | None = None
    """Pixels, brought to the model's grid; by default the image's own size, or the model's."""
    height: Whole | None = None
    """Pixels, brought to the model's grid; by default the image's own size, or the model's."""
    override_settings: dict[str, Any] | None = None
    """Options (`GET /sdapi/v1/options`) for this order alone."""
    force_task_id: Name | None = None
    """What `POST /internal/progress` asks by."""
    send_images: bool | None = True
    """False: the answer has no pictures. They are kept all the same."""
    save_images: bool | None = False
    """Without meaning: every picture is kept for a while."""
    alwayson_scripts: dict[str, Any] | None = None
    """There are no scripts here: one with arguments is refused."""
    script_name: Text | None = None
    """There are no scripts here: one is refused."""
    restore_faces: bool | None = None
    """True is refused."""
    tiling: bool | None = None
    """True is refused."""
    seed_resize_from_w: Whole | None = -1
    """Above 0 it is refused."""
    seed_resize_from_h: Whole | None = -1
    """Above 0 it is refused."""
    refiner_checkpoint: Text | None = None
    """A name is refused."""


class TextToImage(Drawing):
    """An order of `POST /sdapi/v1/txt2img`. Everything but the prompt has a default."""

    enable_hr: bool | None = False
    """Hires fix: the pictures are enlarged and drawn over."""
    denoising_strength: Number | None = None
    """How far the second pass goes from the enlarged picture, above 0 and at most 1; by default 0.75."""
    hr_scale: Number | None = 2.0
    """How many times as large, on each side."""
    hr_resize_x: Whole | None = 0
    """Width of the second pass in place of `hr_scale`; with `hr_resize_y` 0 the height follows."""
    hr_resize_y: Whole | None = 0
    """Height of the second pass; with both, what juts out is cut off."""
    hr_second_pass_steps: Whole | None = 0
    """Steps that the second pass makes; 0 is `steps`."""
    hr_upscaler: Name | None = None
    """Read, and without effect: Lanczos enlarges."""
    hr_prompt: Text | None = ""
    """Of the second pass; by default the first one's."""
    hr_negative_prompt: Text | None = ""
    """Of the second pass; by default the first one's."""
    hr_sampler_name: Name | None = None
    """Of the second pass; by default, or as `Use same sampler`, the first one's."""
    hr_scheduler: Name | None = None
    """Of the second pass; by default, or as `Use same scheduler`, the first one's."""
    hr_checkpoint_name: Name | None = None
    """Model of the second pass; by default, or as `Use same checkpoint`, the first one's."""


class ImageToImage(Drawing):
    """An order of `POST /sdapi/v1/img2img`. Everything but the image has a default."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": "a red circle", "init_images": [_PICTURE], "denoising_strength": 0.6}]
        }
    )

    init_images: Annotated[list[str], Field(max_length=64)] | None = None
    """The image to start from: one file in base64 or as a data URL, or a picture of another job as `<job id>/0`."""
    mask: str | None = None
    """What to repaint of it: white is drawn anew. As large as the image."""
    denoising_strength: Number | None = 0.75
    """Share of the steps that the image goes through, above 0 and at most 1."""
    resize_mode: Annotated[int, Field(ge=0, le=3)] | None = 0
    """How the image comes to width x height: 0 and 3 stretch it, 1 crops it, 2 fills what is missing."""
    mask_blur: Number | None = None
    """Softness of the mask's edge in pixels, 0 to 64; by default `mask_blur_x`."""
    mask_blur_x: Number | None = 4
    """The same, where `mask_blur` is not said."""
    mask_blur_y: Number | None = None
    """Another value than `mask_blur_x` is refused."""
    inpainting_mask_invert: Switch | None = 0
    """1: black is repainted instead."""
    inpainting_fill: Annotated[int, Field(ge=0, le=3)] | None = 0
    """What is repainted starts from: 0 the colours around it, 1 the image itself, 2 noise, 3 nothing."""
    inpaint_full_res: bool | None = True
    """Draw only the surroundings of the mask at width x height, and put them back: the answer is as large as the image.
    False draws the whole picture, which comes to width x height."""
    inpaint_full_res_padding: Whole | None = 0
    """Pixels around the mask that are drawn with it."""
    include_init_images: bool | None = False
    """Whether `parameters` repeat `init_images` and `mask`."""
    initial_noise_multiplier: Number | None = None
    """Another value than 1 is refused."""
    latent_mask: Text | None = None
    """One is refused; send `mask`."""


class Answer(Schema):
    """The pictures of an order."""

    images: tuple[str, ...]
    """Files in base64, without what was interrupted; none where the order says `send_images: false`."""
    parameters: dict[str, Any]
    """The order, with every default of the dialect."""
    info: str
    """JSON: what each picture was made of (`all_prompts`, `all_seeds`, `infotexts`, ...)."""


class State(Schema):
    """What is under way, in A1111's words."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    """The task's id."""
    job_count: int = 0
    """Passes in all: `n_iter`, twice as many with hires fix; 0 where nothing is under way."""
    job_timestamp: str = "0"
    job_no: int = 0
    """Passes that are done."""
    sampling_step: int = 0
    sampling_steps: int = 0


class Progress(Schema):
    """How far the caller's newest synchronous order has come."""

    progress: float
    """0 to 1; 0 where nothing is under way."""
    eta_relative: float
    """Predicted seconds until it ends."""
    state: State
    current_image: str | None = None
    """A small JPEG in base64: the picture as it looks by now."""
    textinfo: str | None = None
    current_task: str | None = None


class TaskQuestion(BaseModel):
    """Which task it is about."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    id_task: Name | None = None
    """The `force_task_id` of an order."""
    id_live_preview: Whole | None = -1
    """What the answer before called so: only a later preview is sent."""
    live_preview: bool | None = True
    """Whether a preview is sent at all."""


class TaskProgress(Schema):
    """How far one task has come. None of `active`, `queued` and `completed` is true of one that is not known."""

    active: bool
    queued: bool
    completed: bool
    progress: float | None = None
    """0 to 1."""
    eta: float | None = None
    """Predicted seconds until it ends."""
    live_preview: str | None = None
    """A small JPEG as a data URL."""
    id_live_preview: int = -1
    textinfo: str | None = None
