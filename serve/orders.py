"""An image order as a client writes it -> the complete request that is logged and can be repeated."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from serve.domain.orders import ImageRequest, MaskedContent, Priority, ResizeMode
from serve.errors import InvalidRequest, ModelNotFound
from serve.models import Denoiser, ModelFolder
from serve.models.presets import AUTO, auto, presets
from serve.models.samplers import SAMPLERS, sampler_names
from serve.placements import Fleet
from serve.prompts.parse import parse
from serve.results.encode import quality_of
from serve.settings.orders import LimitSettings, TemplateSettings
from serve.starting import (
    Given,
    check_answers,
    check_fit,
    mask_blur_of,
    masked_content_of,
    padding_of,
    shape_of,
    strength_of,
    task_of,
)
from serve.wording import NewPrompt, worded

MAX_SEED = 2**32 - 1
"""Seeds fit into 32 bits, so that every client language can hold them."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewImage(NewPrompt):
    """An image order as a client writes it; None takes the model's or the server's default (a random seed).

    `image` and `mask` are files as text (`serve.images`), or name a picture that this server keeps; `resize_mode` is
    how both come to the job's size, `mask_invert` has the mask's black repainted. A size off the model's grid is
    refused unless `round_size`. `priority` and `webhook` (a URL that hears of the job's end) are how it is queued, not
    what is drawn.
    """

    model: str | None = None
    width: int | None = None
    height: int | None = None
    aspect_ratio: str | None = None
    round_size: bool = False
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    seed: int | None = None
    num_images: int = 1
    scheduler: str | None = None
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    mask_blur: float | None = None
    mask_invert: bool = False
    padding_mask_crop: int | None = None
    masked_content: MaskedContent = MaskedContent.ORIGINAL
    resize_mode: ResizeMode = ResizeMode.STRETCH
    variation_seed: int | None = None
    variation_strength: float = 0.0
    clip_skip: int | None = None
    use_t5: bool = True
    preview_every: int = 0
    step_cache: float = 0.0
    tiny_vae: bool = False
    output_format: str = "png"
    output_compression: int | None = None
    bit_depth: int = 8
    priority: Priority = Priority.INTERACTIVE
    webhook: str | None = None
    salt: str = ""


def complete(
    new: NewImage,
    models: Mapping[str, ModelFolder],
    fleet: Fleet,
    limits: LimitSettings,
    given: Mapping[str, Given] | None = None,
    templates: Mapping[str, TemplateSettings] | None = None,
) -> ImageRequest:
    """Every default filled in, every limit checked, the seed fixed, the prompts in words. Raises InvalidRequest or
    ModelNotFound.

    `models` are those that are drawn, the first is the default; `given` has `image` and `mask` where the order has
    them; `templates` are those that it may name. What the text encoders make of the order (`clip_skip`, `use_t5`,
    `composed`) is the planner's to say.
    """
    model, denoiser = drawn(new.model, models)
    given = given or {}
    steps = _steps(new, model, denoiser, limits)
    guidance = _default(new.guidance_scale, denoiser.default_guidance_scale)
    within("guidance_scale", guidance, 0.0, limits.max_guidance_scale)
    within("num_images", new.num_images, 1, limits.max_num_images)
    seed = _seed("seed", new.seed, new.num_images)
    within("variation_strength", new.variation_strength, 0.0, 1.0)
    variation_seed = _seed("variation_seed", new.variation_seed, new.num_images)
    from_image = new.image is not None  # it may be left to show what the picture does
    text = worded(new, templates or {}, limits, seed=seed, num_inference_steps=steps, may_be_empty=from_image)
    parse(text.negative_prompt or "", "negative_prompt", text.syntax)  # also where, without guidance, nobody reads it
    within("preview_every", new.preview_every, 0, steps)
    task = task_of(given, model.name, denoiser)
    check_fit(task, new.resize_mode, mask_invert=new.mask_invert)
    padding = padding_of(new.padding_mask_crop, task, new.resize_mode)
    image = given.get("image")
    # Of which only a part is drawn, whose size the whole does not say.
    cropped = None if padding is None else image
    width, height = size_of(new, model, denoiser, fleet, limits, image if cropped is None else None)
    if cropped is not None:
        check_answers(cropped, new.num_images, limits)
    side = max(width, height) if cropped is None else max(cropped.width, cropped.height)
    return ImageRequest(
        model=model.name,
        prompt=text.prompt,
        negative_prompt=text.negative_prompt or "",
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=float(guidance),
        true_cfg_scale=_true_cfg_scale(new, model, denoiser, limits),
        seed=seed,
        num_images=new.num_images,
        scheduler=new.scheduler,
        image=given["image"].key if new.image is not None else None,
        mask=given["mask"].key if new.mask is not None else None,
        strength=strength_of(new.strength, task, denoiser, steps),
        mask_blur=mask_blur_of(new.mask_blur, task, cropped=padding is not None),
        padding_mask_crop=padding,
        masked_content=masked_content_of(new.masked_content, task),
        variation_seed=variation_seed if new.variation_strength else None,
        variation_strength=float(new.variation_strength),
        prompt_syntax=text.syntax,
        prompt_weighting=new.prompt_weighting,
        long_prompt=new.long_prompt,
        clip_skip=new.clip_skip,
        use_t5=new.use_t5,
        preview_every=new.preview_every,
        step_cache=_step_cache(new, model, fleet),
        tiny_vae=_tiny_vae(new, model, fleet),
        output_format=new.output_format,
        output_compression=quality_of(new.output_format, new.output_compression, new.bit_depth, side),
        bit_depth=new.bit_depth,
        template=text.template,
        arm=text.arm,
        salt=new.salt,
    )


def _steps(new: NewImage, model: ModelFolder, denoiser: Denoiser, limits: LimitSettings) -> int:
    """Steps that are wanted, which the sampler that is wanted can make."""
    steps = _default(new.num_inference_steps, denoiser.default_num_inference_steps)
    within("num_inference_steps", steps, 1, limits.max_num_inference_steps)
    if new.scheduler is not None:
        names = sampler_names(denoiser.process)
        if new.scheduler not in names:
            raise InvalidRequest(f"scheduler: {model.name} has {', '.join(names)}", "scheduler")
        if steps > (most := SAMPLERS[new.scheduler].most_steps or steps):
            raise InvalidRequest(f"num_inference_steps: {new.scheduler} makes at most {most}", "num_inference_steps")
    return steps


def within(field: str, value: float, least: float, most: float) -> None:
    """Raises InvalidRequest that names `field`."""
    if not least <= value <= most:  # also refuses NaN
        raise InvalidRequest(f"{field} must be between {least} and {most}", field)


def longest_side(denoiser: Denoiser, limits: LimitSettings) -> int:
    """Of an image, in pixels, on the model's grid."""
    longest = min(limits.max_side, denoiser.largest_side or limits.max_side)
    return longest - longest % denoiser.size_multiple


def drawn(name: str | None, models: Mapping[str, ModelFolder]) -> tuple[ModelFolder, Denoiser]:
    """The model of that name, by default the first. Raises ModelNotFound."""
    if not models:
        raise ModelNotFound("this server only encodes text (diffusion.replicas is 0); see POST /v1/embeddings", "model")
    model = next(iter(models.values())) if name is None else models.get(name)
    if model is None:
        served = ", ".join(map(repr, models))
        raise ModelNotFound(f"model {name!r} is not served here; this server draws with {served}", "model")
    assert model.denoiser is not None  # it is drawn with
    return model, model.denoiser


def _seed(field: str, seed: int | None, num_images: int) -> int:
    """By default a random one. Image i of the order may have it plus i."""
    last = MAX_SEED + 1 - num_images
    if seed is None:
        return secrets.randbelow(last + 1)
    within(field, seed, 0, last)
    return seed


def size_of(
    new: NewImage,
    model: ModelFolder,
    denoiser: Denoiser,
    fleet: Fleet,
    limits: LimitSettings,
    image: Given | None = None,
) -> tuple[int, int]:
    """Width and height in pixels: as the order says, else as its image is, else as the model is made for. Raises
    InvalidRequest."""
    if new.aspect_ratio is not None:
        field, size = "aspect_ratio", _preset(new, model, denoiser, limits, image)
    elif image is not None and None in (new.width, new.height):
        field, size = "image", _image_size(new, denoiser, limits, image)
    else:
        field, size = "width", _written_size(new, denoiser, limits, (denoiser.default_width, denoiser.default_height))
    try:
        fleet.check(model.name, *size)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, field) from None
    return size


def _preset(
    new: NewImage, model: ModelFolder, denoiser: Denoiser, limits: LimitSettings, image: Given | None
) -> tuple[int, int]:
    if new.width is not None or new.height is not None:
        raise InvalidRequest("aspect_ratio stands in place of width and height; send one or the other", "aspect_ratio")
    if new.aspect_ratio == AUTO:
        if image is None:
            return denoiser.default_width, denoiser.default_height
        return auto(denoiser, model.family, image.width, image.height, max_side=limits.max_side)
    known = presets(denoiser, model.family, max_side=limits.max_side)
    if new.aspect_ratio is None or new.aspect_ratio not in known:
        raise InvalidRequest(f"aspect_ratio: there are {', '.join(known)} and {AUTO}", "aspect_ratio")
    return known[new.aspect_ratio]


def _image_size(new: NewImage, denoiser: Denoiser, limits: LimitSettings, image: Given) -> tuple[int, int]:
    """The image's own size, rounded down to the grid, where the order names none."""
    grid, most = denoiser.size_multiple, longest_side(denoiser, limits)
    own = image.width - image.width % grid, image.height - image.height % grid
    for written, side in zip((new.width, new.height), own, strict=True):
        if written is None and not grid <= side <= most:
            raise InvalidRequest(
                f"image is {shape_of(image)}; sides of {grid} to {most} are drawn, so say width and height", "image"
            )
    return _written_size(new, denoiser, limits, own)


def _written_size(
    new: NewImage, denoiser: Denoiser, limits: LimitSettings, default: tuple[int, int]
) -> tuple[int, int]:
    grid, most = denoiser.size_multiple, longest_side(denoiser, limits)
    sides = {"width": _default(new.width, default[0]), "height": _default(new.height, default[1])}
    for field, pixels in sides.items():
        within(field, pixels, 1 if new.round_size else grid, most)
    if new.round_size:
        width, height = (_nearest(pixels, grid, most)[0] for pixels in sides.values())
        return width, height
    off = {field: sorted(_nearest(pixels, grid, most)) for field, pixels in sides.items() if pixels % grid}
    if off:
        told = (
            f"{field} {sides[field]} is not a multiple of {grid}; the nearest are {' and '.join(map(str, good))}"
            for field, good in off.items()
        )
        raise InvalidRequest(f"{', '.join(told)} (round_size: true takes the nearest)", next(iter(off)))
    return sides["width"], sides["height"]


def _nearest(pixels: int, grid: int, most: int) -> tuple[int, ...]:
    """The sizes on the grid around `pixels`, the nearest first; of two as near, the smaller."""
    below = pixels - pixels % grid
    around = [side for side in (below, below + grid) if grid <= side <= most]
    return tuple(sorted(around, key=lambda side: abs(side - pixels)))


def _true_cfg_scale(new: NewImage, model: ModelFolder, denoiser: Denoiser, limits: LimitSettings) -> float | None:
    """Models that were distilled on a guidance scale have the classifier-free kind beside it, off by default."""
    if denoiser.guidance == "classifier_free":
        if new.true_cfg_scale is not None:
            raise InvalidRequest(f"true_cfg_scale: {model.name} has guidance_scale alone", "true_cfg_scale")
        return None
    scale = _default(new.true_cfg_scale, 1.0)
    within("true_cfg_scale", scale, 0.0, limits.max_guidance_scale)
    if scale > 1 and model.family != "flux":
        raise InvalidRequest(f"true_cfg_scale: {model.name} is drawn without it", "true_cfg_scale")
    return float(scale)


def _step_cache(new: NewImage, model: ModelFolder, fleet: Fleet) -> float:
    within("step_cache", new.step_cache, 0.0, 1.0)
    if new.step_cache and not fleet.step_cache(model.name):
        raise InvalidRequest(f"step_cache: {model.name} is drawn exactly here (diffusion.step_cache)", "step_cache")
    return float(new.step_cache)


def _tiny_vae(new: NewImage, model: ModelFolder, fleet: Fleet) -> bool:
    if new.tiny_vae and not fleet.tiny_vae(model.name):
        raise InvalidRequest(f"tiny_vae: {model.name} has none here (diffusion.tiny_vae)", "tiny_vae")
    return new.tiny_vae


def _default(value: T | None, default: T) -> T:
    return default if value is None else value
