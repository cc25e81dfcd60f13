"""What an order says of the pictures that it starts from: what may be asked, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from serve.domain.orders import MaskedContent, ResizeMode, Task
from serve.errors import InvalidRequest
from serve.models import Denoiser
from serve.settings.orders import LimitSettings

MAX_MASK_BLUR = 64
"""Pixels."""
CROPPED_MASK_BLUR = 4.0
MAX_PADDING = 4096
"""Pixels."""
_NEEDS = {Task.TXT2IMG: "text alone", Task.IMG2IMG: "an image", Task.INPAINT: "an image and a mask"}


@dataclass(frozen=True, slots=True)
class Given:
    """What an order's `image` or `mask` stands for: the result key that its pixels will have, and its own size."""

    key: str
    width: int
    height: int


def shape_of(given: Given) -> str:
    return f"{given.width} x {given.height}"


def task_of(given: Mapping[str, Given], name: str, denoiser: Denoiser) -> Task:
    """What is asked for, if the model of that name can do it. `given` has `image` and `mask` where the order has
    them. Raises InvalidRequest, as all here do."""
    image, mask = given.get("image"), given.get("mask")
    if image is None and mask is not None:
        raise InvalidRequest("mask: there is no image that it is for", "mask")
    if image is not None and mask is not None and shape_of(mask) != shape_of(image):
        raise InvalidRequest(f"mask is {shape_of(mask)}, the image {shape_of(image)}", "mask")
    task = Task.TXT2IMG if image is None else Task.IMG2IMG if mask is None else Task.INPAINT
    if task not in denoiser.tasks:
        wants_mask = task is Task.IMG2IMG and Task.INPAINT in denoiser.tasks
        no_mask = task is Task.INPAINT and Task.IMG2IMG in denoiser.tasks
        field = "mask" if wants_mask or no_mask else "image"
        able = " or ".join(words for kind, words in _NEEDS.items() if kind in denoiser.tasks)
        raise InvalidRequest(f"{field}: {name} draws from {able}", field)
    return task


def strength_of(written: float | None, task: Task, denoiser: Denoiser, steps: int) -> float | None:
    """The share of the steps that the image goes through; None without an image."""
    if task is Task.TXT2IMG:
        if written is not None:
            raise InvalidRequest("strength: there is no image to start from", "strength")
        return None
    default = 1.0 if task is Task.INPAINT else denoiser.default_strength
    strength = default if written is None else written
    if not 0 < strength <= 1:
        raise InvalidRequest("strength must be above 0 and at most 1", "strength")
    if int(steps * strength) < 1:  # as the stock pipelines count them
        raise InvalidRequest(f"strength {strength:g} of {steps} steps leaves none; ask for more of either", "strength")
    return float(strength)


def mask_blur_of(written: float | None, task: Task, *, cropped: bool) -> float | None:
    """Where only a part of the picture is drawn it has an edge in any case, by default A1111's."""
    if written is None:
        return CROPPED_MASK_BLUR if cropped else None
    if task is not Task.INPAINT:
        raise InvalidRequest("mask_blur: there is no mask", "mask_blur")
    if not 0 <= written <= MAX_MASK_BLUR:
        raise InvalidRequest(f"mask_blur must be between 0 and {MAX_MASK_BLUR} pixels", "mask_blur")
    return float(written)


def padding_of(written: int | None, task: Task, mode: ResizeMode) -> int | None:
    """Pixels around the mask that are drawn with it; None where the whole picture is."""
    if written is None:
        return None
    if task is not Task.INPAINT:
        raise InvalidRequest("padding_mask_crop: there is no mask", "padding_mask_crop")
    if not 0 <= written <= MAX_PADDING:
        raise InvalidRequest(f"padding_mask_crop must be between 0 and {MAX_PADDING} pixels", "padding_mask_crop")
    if mode is not ResizeMode.STRETCH:
        raise InvalidRequest("resize_mode: with padding_mask_crop the picture keeps its size", "resize_mode")
    return written


def check_answers(image: Given, num_images: int, limits: LimitSettings) -> None:
    """Where the answers are as large as the picture that was sent, they may not have more pixels together than that
    might have had."""
    if image.width * image.height * num_images > limits.max_image_pixels:
        raise InvalidRequest(
            f"num_images: {num_images} pictures of {shape_of(image)} have more than {limits.max_image_pixels} pixels; "
            "with padding_mask_crop each is as large as the image",
            "num_images",
        )


def masked_content_of(written: MaskedContent, task: Task) -> MaskedContent:
    if written is not MaskedContent.ORIGINAL and task is not Task.INPAINT:
        raise InvalidRequest("masked_content: there is no mask", "masked_content")
    return written


def check_fit(task: Task, mode: ResizeMode, *, mask_invert: bool) -> None:
    """What was asked of pictures that are not there is refused, rather than passed over."""
    if mode is not ResizeMode.STRETCH and task is Task.TXT2IMG:
        raise InvalidRequest("resize_mode: there is no image to resize", "resize_mode")
    if mask_invert and task is not Task.INPAINT:
        raise InvalidRequest("mask_invert: there is no mask", "mask_invert")
