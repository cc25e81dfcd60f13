"""What this server offers of a model that it draws with, and what its self-test finds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from serve.domain.orders import Task
from serve.models import Denoiser, ModelFolder
from serve.models.denoiser import Guidance
from serve.models.presets import presets
from serve.models.quality import quality_steps
from serve.models.samplers import sampler_names
from serve.orders import longest_side
from serve.placements import Fleet
from serve.settings.orders import LimitSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model that is drawn with, and the defaults of an order. Sizes are pixels, multiples of `size_multiple`.

    `created` is when this server's copy was made, in Unix seconds. `max_pixels` is the largest image that a GPU here
    holds, `aspect_ratios` the sizes that fit into it. `guidance` says what `guidance_scale` means to the model.
    """

    id: str
    created: int
    family: str
    tasks: tuple[Task, ...]
    default_width: int
    default_height: int
    size_multiple: int
    max_side: int
    max_pixels: int
    aspect_ratios: Mapping[str, tuple[int, int]]
    schedulers: tuple[str, ...]
    guidance: Guidance
    default_num_inference_steps: int
    quality_steps: Mapping[str, int]
    default_guidance_scale: float
    default_strength: float
    step_cache: bool
    tiny_vae: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """`batch_size` entries of one forward pass take `step_s`, the median. `images_per_s` is what that makes of images
    with the model's default steps and guidance, which gives an image two entries; decoding is not in it."""

    batch_size: int
    step_s: float
    images_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """What `benchmark` measured: by placement, the time of a step by batch."""

    model: str
    width: int
    height: int
    steps: int
    placements: Mapping[str, tuple[StepTime, ...]]


def model_info(model: ModelFolder, denoiser: Denoiser, fleet: Fleet, limits: LimitSettings) -> ModelInfo:
    most = fleet.max_pixels(model.name)
    sizes = presets(denoiser, model.family, max_side=limits.max_side)
    return ModelInfo(
        id=model.name,
        created=model.created,
        family=model.family,
        tasks=tuple(task for task in Task if task in denoiser.tasks),
        default_width=denoiser.default_width,
        default_height=denoiser.default_height,
        size_multiple=denoiser.size_multiple,
        max_side=longest_side(denoiser, limits),
        max_pixels=most,
        aspect_ratios={name: (wide, high) for name, (wide, high) in sizes.items() if wide * high <= most},
        schedulers=sampler_names(denoiser.process),
        guidance=denoiser.guidance,
        default_num_inference_steps=denoiser.default_num_inference_steps,
        quality_steps=quality_steps(denoiser.default_num_inference_steps, limits.max_num_inference_steps),
        default_guidance_scale=denoiser.default_guidance_scale,
        default_strength=denoiser.default_strength,
        step_cache=fleet.step_cache(model.name),
        tiny_vae=fleet.tiny_vae(model.name),
    )


def step_times(denoiser: Denoiser, measured: Mapping[int, Sequence[float]]) -> Iterable[StepTime]:
    """`measured`: batch entries -> seconds of each step."""
    guided = denoiser.guidance == "classifier_free" and denoiser.default_guidance_scale > 1
    entries = denoiser.default_num_inference_steps * (2 if guided else 1)
    for batch_size, seconds in measured.items():
        step_s = statistics.median(seconds)
        yield StepTime(batch_size=batch_size, step_s=step_s, images_per_s=batch_size / (entries * step_s))
