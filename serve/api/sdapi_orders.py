"""An order as A1111's clients write it -> the orders of ours that it comes to: one for each of `n_iter`, and what a
hires fix makes of their pictures."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.api.sdapi_hires import STRENGTH, Enlarged, enlarged_of
from serve.api.sdapi_schemas import Drawing, ImageToImage
from serve.api.sdapi_words import OVERRIDES, braced, guidance, sampler
from serve.callers import Caller
from serve.domain.orders import MaskedContent, ResizeMode
from serve.domain.text import Syntax, Weighting
from serve.errors import InvalidRequest, JobNotFound
from serve.offers import ModelInfo
from serve.options import Options, changed, styled
from serve.orders import MAX_SEED, NewImage, within
from serve.service import ImageService

_OPTIONS = tuple(field.name for field in dataclasses.fields(Options))
_LONGEST = 1 << 20
"""Characters of both texts while styles are put around them."""
_CONTENTS = (
    MaskedContent.FILL,
    MaskedContent.ORIGINAL,
    MaskedContent.LATENT_NOISE,
    MaskedContent.LATENT_NOTHING,
)
_RESIZE = (ResizeMode.STRETCH, ResizeMode.CROP, ResizeMode.FILL, ResizeMode.STRETCH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What a call draws: the order of each round, and the second pass, None without hires fix."""

    rounds: tuple[NewImage, ...]
    enlarged: Enlarged | None


async def course_of(order: Drawing, service: ImageService, caller: Caller) -> Course:
    """Raises InvalidRequest, ModelNotFound, JobNotFound where there is no image, BackendUnavailable."""
    _check(order)
    infos = {info.id: info for info in service.models()}
    options = changed(await service.options(caller), order.override_settings or {}, list(infos), OVERRIDES)
    info = _info(options.sd_model_checkpoint, infos)
    new = _new(order, options, info, service, caller)
    return Course(rounds=_rounds(order, new, service.max_num_images), enlarged=enlarged_of(order, new, info, infos))


def _check(order: Drawing) -> None:
    """What would change the picture and can't be done here is refused."""
    given = {
        "restore_faces": order.restore_faces,
        "tiling": order.tiling,
        "seed_resize_from_w": (order.seed_resize_from_w or 0) > 0,
        "seed_resize_from_h": (order.seed_resize_from_h or 0) > 0,
        "refiner_checkpoint": (order.refiner_checkpoint or "None") != "None",
        "script_name": (order.script_name or "None") != "None",
    }
    if isinstance(order, ImageToImage):
        given["latent_mask"] = order.latent_mask is not None
        given["initial_noise_multiplier"] = order.initial_noise_multiplier not in (None, 1)
        given["mask_blur_y"] = order.mask_blur is None and order.mask_blur_y not in (None, order.mask_blur_x)
    for field, wanted in given.items():
        if wanted:
            raise InvalidRequest(f"{field}: there is no such thing here; leave it out", field)
    for name, script in (order.alwayson_scripts or {}).items():
        if _runs(script):
            field = f"alwayson_scripts.{name}"
            raise InvalidRequest(f"{field}: there are no scripts here", field)


def _runs(script: Any) -> bool:
    """Clients send the scripts that they know switched off: without arguments, or with false ones."""
    arguments = script.get("args") if isinstance(script, Mapping) else script
    return any(arguments) if isinstance(arguments, list) else bool(arguments)


def _info(model: str | None, infos: Mapping[str, ModelInfo]) -> ModelInfo | None:
    """None where nothing is drawn: the submission says so."""
    return infos[model] if model is not None else next(iter(infos.values()), None)


def _new(order: Drawing, options: Options, info: ModelInfo | None, service: ImageService, caller: Caller) -> NewImage:
    prompt, negative = _texts(order, service)
    every = options.show_progress_every_n_steps if options.live_previews_enable else 0
    steps = order.steps if order.steps is not None else (info.default_num_inference_steps if info else 1)
    plain = options.samples_format == "png"
    return NewImage(
        prompt=prompt,
        negative_prompt=negative,
        prompt_syntax=Syntax.A1111,
        prompt_weighting=Weighting.A1111,
        model=info.id if info else None,
        width=order.width,
        height=order.height,
        round_size=True,
        num_inference_steps=order.steps,
        scheduler=sampler(info, order.sampler_name or order.sampler_index, order.scheduler),
        variation_strength=order.subseed_strength or 0.0,
        clip_skip=options.CLIP_stop_at_last_layers - 1 or None,
        preview_every=max(0, min(every, steps)),
        output_format=options.samples_format,
        output_compression=None if plain else options.jpeg_quality,
        salt=caller.salt,
        **guidance(order, info),
        **(_started(order) if isinstance(order, ImageToImage) else {}),
    )


def _texts(order: Drawing, service: ImageService) -> tuple[str, str]:
    known = service.styles()
    for name in order.styles or ():
        if name not in known:
            raise InvalidRequest(f"styles: there is no {name!r}; there are: {', '.join(known) or 'none'}", "styles")
    prompt, negative = order.prompt or "", order.negative_prompt or ""
    for name in order.styles or ():
        prompt, negative = styled(prompt, negative, [known[name]])
        if len(prompt) + len(negative) > _LONGEST:  # a style may have its place for the prompt twice
            raise InvalidRequest("styles: the prompts grow too long", "styles")
    return braced(prompt), braced(negative)


def _started(order: ImageToImage) -> dict[str, Any]:
    images = order.init_images or []
    if not images:
        raise JobNotFound("Init image not found", "init_images")
    if len(images) > 1:
        raise InvalidRequest("init_images: one image at a time", "init_images")
    started: dict[str, Any] = {
        "image": images[0],
        "strength": STRENGTH if order.denoising_strength is None else order.denoising_strength,
        "resize_mode": _RESIZE[order.resize_mode or 0],
    }
    if order.mask is None:
        return started
    blur = next(each for each in (order.mask_blur, order.mask_blur_x, order.mask_blur_y, 4) if each is not None)
    masked = {
        "mask": order.mask,
        "mask_blur": blur,
        "mask_invert": bool(order.inpainting_mask_invert),
        "masked_content": _CONTENTS[order.inpainting_fill or 0],
    }
    if order.inpaint_full_res is False:
        return started | masked
    return started | masked | {
        "padding_mask_crop": order.inpaint_full_res_padding or 0,
        "resize_mode": ResizeMode.STRETCH,  # nothing comes to another size
    }  # fmt: skip


def _rounds(order: Drawing, new: NewImage, most: int) -> tuple[NewImage, ...]:
    """The seeds of all pictures are one row. `most` pictures may be ordered at once."""
    size = 1 if order.batch_size is None else order.batch_size
    rounds = 1 if order.n_iter is None else order.n_iter
    within("batch_size", size, 1, most)
    within("n_iter", rounds, 1, most // size)
    total = size * rounds
    seed, subseed = _seed("seed", order.seed, total), _seed("subseed", order.subseed, total)
    varied = new.variation_strength > 0
    return tuple(
        dataclasses.replace(
            new,
            num_images=size,
            seed=seed if varied else seed + first,
            variation_seed=subseed + first if varied else None,
        )
        for first in range(0, total, size)
    )


def _seed(field: str, seed: int | None, total: int) -> int:
    last = MAX_SEED + 1 - total
    if seed is None or seed == -1:
        return secrets.randbelow(last + 1)
    within(field, seed, 0, last)
    return seed


def echoed(order: Drawing) -> dict[str, Any]:
    """What an answer repeats of the order: neither pictures nor what was passed over, which may be large."""
    known = {name: value for name, value in (order.override_settings or {}).items() if name in _OPTIONS}
    left = {"init_images": None, "mask": None, "latent_mask": None} if isinstance(order, ImageToImage) else {}
    return order.model_dump(mode="json", exclude=set(left)) | left | {
        "override_settings": known, "alwayson_scripts": {}, "script_name": None, "refiner_checkpoint": None
    }  # fmt: skip
