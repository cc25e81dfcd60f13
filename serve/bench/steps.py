"""How long one denoising step takes, by size and number of images: what bounds every gain of step batching."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch

from serve.diffusion.families.base import Family
from serve.diffusion.runner import Runner
from serve.models import Denoiser

SIZES = (1, 2, 4, 8, 16)
_RUNS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """One step of `images` guided images of `width` x `height` pixels together; the median of several, seconds."""

    width: int
    height: int
    images: int
    seconds: float

    @property
    def per_image(self) -> float:
        return self.seconds / self.images


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTable:
    """The rows of one size. `decode_s` is the VAE's time for one image; `gain` is how many times the images a second
    of one-by-one steps the best batch makes: no engine gains more on these images by step batching."""

    times: tuple[StepTime, ...]
    decode_s: float

    @property
    def gain(self) -> float:
        return self.times[0].per_image / min(one.per_image for one in self.times)


def measure_steps(runner: Runner, denoiser: Denoiser, width: int, height: int, longest_s: float) -> StepTable:
    """Batches up to the first whose step would take longer than `longest_s`."""
    factor = denoiser.vae_scale_factor
    shape = (height // factor, width // factor)
    lanes = 2 if denoiser.guidance == "classifier_free" else 1
    times: list[StepTime] = []
    for images in SIZES:
        if times and times[-1].seconds * 2 > longest_s:
            break
        runner.measure(shape, lanes * images)  # warms up
        seconds = median(runner.measure(shape, lanes * images) for _ in range(_RUNS))
        times.append(StepTime(width=width, height=height, images=images, seconds=seconds))
    return StepTable(times=tuple(times), decode_s=median(_decode(runner.family, shape) for _ in range(_RUNS)))


def _decode(family: Family, shape: tuple[int, int]) -> float:
    """Seconds. The pixels come back to the CPU, so that a GPU has finished."""
    assert family.model.denoiser is not None
    latents = torch.zeros((1, family.model.denoiser.latent_channels, *shape), dtype=family.dtype, device=family.device)
    began = time.perf_counter()
    with torch.inference_mode():
        family.vae.decode(latents)
    return time.perf_counter() - began
