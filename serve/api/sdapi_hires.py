"""The second pass of a hires fix: each picture is enlarged and drawn over. In A1111 it is part of one sampling; here an
order of its own, which starts from the picture that was drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.api.sdapi_schemas import Drawing, TextToImage
from serve.api.sdapi_words import NAMES, braced, guidance, sampler
from serve.domain.jobs import Job
from serve.domain.orders import ResizeMode, Task
from serve.errors import InvalidRequest
from serve.offers import ModelInfo
from serve.options import model_named
from serve.orders import MAX_SEED, NewImage, within
from serve.results.keys import reference

UPSCALER = "Lanczos"
"""What enlarges a picture for its second pass, as any picture to start from."""
STRENGTH, SCALE = 0.75, 2.0

_MOST_STEPS, _MOST_SCALE = 10_000, 16.0
"""Beyond what the server's own limits may be; here they only keep numbers calculable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Enlarged:
    """The second pass of a hires fix. `order` is that of a picture, but for the picture and its seed; `prompt` and
    `negative_prompt` are None where they are the first pass's. `names` are A1111's of its fields; `told` is what its
    info text says of it."""

    order: NewImage
    prompt: str | None
    negative_prompt: str | None
    names: Mapping[str, str]
    told: Mapping[str, Any]

    def of(self, job: Job, index: int) -> NewImage:
        """The order of picture `index` of a job. Its prompts are as they were drawn: choices are made."""
        request = job.request
        return dataclasses.replace(
            self.order,
            prompt=request.prompt if self.prompt is None else self.prompt,
            negative_prompt=request.negative_prompt if self.negative_prompt is None else self.negative_prompt,
            image=reference(job.images[index].key),
            seed=request.seed_of(index),
            variation_seed=request.variation_seed_of(index),
            variation_strength=request.variation_strength,
        )

    def trial(self, first: NewImage) -> NewImage:
        """As much of it as can be judged before there is a picture."""
        return dataclasses.replace(
            self.order,
            prompt=first.prompt if self.prompt is None else self.prompt,
            negative_prompt=first.negative_prompt if self.negative_prompt is None else self.negative_prompt,
            strength=None,
            resize_mode=ResizeMode.STRETCH,
        )


def enlarged_of(
    order: Drawing, new: NewImage, info: ModelInfo | None, infos: Mapping[str, ModelInfo]
) -> Enlarged | None:
    if not isinstance(order, TextToImage) or not order.enable_hr or info is None:
        return None
    name = _unless_same(order.hr_checkpoint_name)
    model = infos[model_named(name, list(infos), "hr_checkpoint_name")] if name else info
    if Task.IMG2IMG not in model.tasks:
        raise InvalidRequest(f"enable_hr: {model.id} does not draw from an image", "enable_hr")
    names = _hires_names(order)
    size = _hires_size(order, info)
    strength = STRENGTH if order.denoising_strength is None else order.denoising_strength
    if not 0 < strength <= 1:
        raise InvalidRequest("denoising_strength must be above 0 and at most 1", "denoising_strength")
    steps = _hires_steps(order, info)
    in_all = math.ceil(min(steps / strength, _MOST_STEPS))  # of which as many are made as were asked for
    resampled = _unless_same(order.hr_sampler_name) or _unless_same(order.hr_scheduler) or model is not info
    return Enlarged(
        order=dataclasses.replace(
            new,
            model=model.id,
            width=size[0],
            height=size[1],
            resize_mode=ResizeMode.CROP if order.hr_resize_x and order.hr_resize_y else ResizeMode.STRETCH,
            num_inference_steps=in_all,
            preview_every=min(new.preview_every, in_all),
            strength=strength,
            scheduler=_hires_sampler(order, model) if resampled else new.scheduler,
            **guidance(order, model),
        ),
        prompt=braced(order.hr_prompt) if order.hr_prompt else None,
        negative_prompt=braced(order.hr_negative_prompt) if order.hr_negative_prompt else None,
        names=names,
        told=_hires_told(order, steps),
    )


def _unless_same(name: str | None) -> str | None:
    return None if name is None or name.lower().startswith("use same") else name or None


def _hires_names(order: TextToImage) -> Mapping[str, str]:
    sized = bool(order.hr_resize_x or order.hr_resize_y)
    own = {
        "model": "hr_checkpoint_name",
        "width": "hr_resize_x" if sized else "hr_scale",
        "height": "hr_resize_y" if sized else "hr_scale",
        "num_inference_steps": "hr_second_pass_steps" if order.hr_second_pass_steps else "steps",
        "scheduler": "hr_scheduler",
        "sampler_name": "hr_sampler_name",
    }
    own |= {"prompt": "hr_prompt"} if order.hr_prompt else {}
    own |= {"negative_prompt": "hr_negative_prompt"} if order.hr_negative_prompt else {}
    return {**NAMES, **own}


def _hires_sampler(order: TextToImage, model: ModelInfo) -> str | None:
    own = _unless_same(order.hr_sampler_name)
    schedule = _unless_same(order.hr_scheduler) or order.scheduler
    try:
        return sampler(model, own or order.sampler_name or order.sampler_index, schedule)
    except InvalidRequest as error:
        field = f"hr_{error.param}"
        raise InvalidRequest(f"hr_{error.message}", field) from None


def _hires_size(order: TextToImage, info: ModelInfo) -> tuple[int, int]:
    """Of the second pass, in pixels, as A1111's `calculate_target_resolution` has it."""
    width = info.default_width if order.width is None else order.width
    height = info.default_height if order.height is None else order.height
    wide, high = order.hr_resize_x or 0, order.hr_resize_y or 0
    within("hr_resize_x", wide, 0, MAX_SEED)
    within("hr_resize_y", high, 0, MAX_SEED)
    within("width", width, 1, MAX_SEED)
    within("height", height, 1, MAX_SEED)
    if wide and high:
        return wide, high
    if wide:
        return wide, wide * height // width
    if high:
        return high * width // height, high
    scale = SCALE if order.hr_scale is None else order.hr_scale
    within("hr_scale", scale, 1.0, _MOST_SCALE)
    return int(width * scale), int(height * scale)


def _hires_steps(order: TextToImage, info: ModelInfo) -> int:
    steps = info.default_num_inference_steps if order.steps is None else order.steps
    own = order.hr_second_pass_steps or 0
    within("steps", steps, 1, _MOST_STEPS)
    within("hr_second_pass_steps", own, 0, _MOST_STEPS)
    return own or steps


def _hires_told(order: TextToImage, steps: int) -> dict[str, Any]:
    wide, high = order.hr_resize_x or 0, order.hr_resize_y or 0
    told: dict[str, Any] = {
        "Hires prompt": order.hr_prompt or None,
        "Hires negative prompt": order.hr_negative_prompt or None,
        "Hires resize": f"{wide}x{high}" if wide or high else None,
        "Hires upscale": None if wide or high else (SCALE if order.hr_scale is None else order.hr_scale),
        "Hires steps": steps,
        "Hires upscaler": UPSCALER,
        "Hires sampler": _unless_same(order.hr_sampler_name),
        "Hires schedule type": _unless_same(order.hr_scheduler),
        "Hires checkpoint": _unless_same(order.hr_checkpoint_name),
    }
    return {label: value for label, value in told.items() if value is not None}
