"""One image in the making: what it starts from, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image

from serve.diffusion.families.base import Family, Lane
from serve.diffusion.noise import varied
from serve.diffusion.samplers import Track
from serve.diffusion.step_cache import StepCache
from serve.diffusion.texts import Sides, Texts
from serve.diffusion.vae import Moments
from serve.domain.orders import ImageRequest, MaskedContent, Task
from serve.models.denoiser import Denoiser

INPAINTING_CHANNELS = 9
"""Of a U-Net that reads the mask and the masked image beside the latents."""


@dataclass(frozen=True, slots=True)
class Start:
    """What is drawn for one image before its first step: every tensor is (1, channels, h, w), on the device.

    `noise` is standard normal. `image` are the latents of the image to start from, `mask` is 1 where it is repainted;
    `extra` is what an inpainting U-Net reads beside the latents. The generator has made just these draws.
    """

    generator: torch.Generator
    noise: torch.Tensor
    image: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    extra: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """The starts of a run's images, in order."""

    starts: tuple[Start, ...]


def start_from_noise(family: Family, request: ImageRequest, index: int, shape: tuple[int, int]) -> Start:
    """The noise is drawn as diffusers' pipelines do: on the CPU, in the model's dtype."""
    return _start(family, request, index, shape)


def start_from_image(
    family: Family, request: ImageRequest, image: Image.Image, mask: Image.Image | None, side: int | None = None
) -> Source:
    """Encode the image (and its unmasked part, where the U-Net reads it) once, and draw every image's start from it.
    `side` is that of the tiles in which it is encoded, None for the VAE's own.

    The order of the draws is the stock pipelines': the image's latents, the noise, the masked image's latents. Those
    that inpaint without such a U-Net make the last draw all the same, so samplers that add noise must find it made.
    """
    pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1).unsqueeze(0)
    pixels = 2.0 * (pixels / 255.0) - 1.0
    shape = pixels.shape[2] // family.vae.scale_factor, pixels.shape[3] // family.vae.scale_factor
    if request.task is not Task.INPAINT:
        moments = family.vae.encode(pixels, side=side)
        return Source(tuple(_start(family, request, index, shape, moments) for index in range(request.num_images)))
    assert mask is not None, "inpainting has a mask"
    white = torch.from_numpy(np.array(mask.convert("L"), dtype=np.float32) / 255.0 >= 0.5)[None, None].float()
    small = family.place(torch.nn.functional.interpolate(white, size=shape))
    reads_mask = _denoiser(family).in_channels == INPAINTING_CHANNELS
    whole = None if reads_mask and full(request) else family.vae.encode(pixels, side=side)
    kept = family.vae.encode(pixels * (white < 0.5), side=side) if reads_mask else whole
    starts = []
    for index in range(request.num_images):
        start = _masked(_start(family, request, index, shape, whole), small, request.masked_content)
        assert kept is not None
        beside = kept.sample(start.generator)
        starts.append(replace(start, extra=torch.cat([small, beside], 1)) if reads_mask else replace(start, mask=small))
    return Source(tuple(starts))


def _start(
    family: Family, request: ImageRequest, index: int, shape: tuple[int, int], image: Moments | None = None
) -> Start:
    generator = torch.Generator("cpu").manual_seed(request.seed_of(index))
    latents = None if image is None else image.sample(generator)
    size = (1, _denoiser(family).latent_channels, *shape)
    noise = torch.randn(size, generator=generator, dtype=family.dtype)
    seed = request.variation_seed_of(index)
    if seed is not None:
        noise = varied(noise, seed, request.variation_strength)
    return Start(generator, noise.to(family.device), latents)


def _masked(start: Start, mask: torch.Tensor, content: MaskedContent) -> Start:
    """With noise, or with nothing, under the mask."""
    if start.image is None or content not in (MaskedContent.LATENT_NOISE, MaskedContent.LATENT_NOTHING):
        return start
    under = start.noise if content is MaskedContent.LATENT_NOISE else torch.zeros_like(start.image)
    return replace(start, image=(1 - mask) * start.image + mask * under)


def _denoiser(family: Family) -> Denoiser:
    assert family.model.denoiser is not None, "a model for text only is never drawn with"
    return family.model.denoiser


def full(request: ImageRequest) -> bool:
    """Whether all steps are made, as if there were no image to start from."""
    return request.strength is None or request.strength == 1.0


@dataclass(slots=True)
class ImageState:
    """`latents` is (1, C, h, w). All that is mutable here is this image's alone; the texts are shared by a run.

    `original`, kept for images that are previewed, is what the denoiser last took the finished latents to be. `_sides`
    is what the last forward pass read, or the one that is being made.
    """

    request: ImageRequest
    track: Track
    start: Start
    texts: Texts
    latents: torch.Tensor
    cache: StepCache | None = None
    original: torch.Tensor | None = None
    _input: torch.Tensor | None = field(default=None, repr=False)
    _sides: Sides | None = field(default=None, repr=False)

    @classmethod
    def open(cls, request: ImageRequest, track: Track, start: Start, texts: Texts) -> ImageState:
        """Pure noise, or the image with as much noise as the step has that is made first.

        An inpainted image starts from pure noise at strength 1, as in the stock pipelines.
        """
        if start.image is None or (request.task is Task.INPAINT and full(request)):
            latents = start.noise * getattr(track.scheduler, "init_noise_sigma", 1.0)
        else:
            a, b = track.mixture()
            latents = a * start.image + b * start.noise
        cache = StepCache(request.step_cache, track.forwards) if request.step_cache > 0 else None
        return cls(request, track, start, texts, latents, cache)

    @property
    def reused(self) -> bool:
        """Whether a prediction stood for one that was not made."""
        return self.cache is not None and self.cache.reuses > 0

    def model_input(self) -> torch.Tensor:
        """The latents as the denoiser reads them now; asked for more than once in a step, computed once."""
        if self._input is None:
            self._input = self.track.model_input(self.latents)
        return self._input

    def lanes(self) -> list[Lane]:
        """Of the text of the step that is made next: the negative one first, where there is guidance."""
        self._sides = self.texts.at(self.track.step)
        inputs, timestep, extra = self.model_input(), self.track.timestep, self.start.extra
        return [Lane(inputs, timestep, text, self.request.guidance_scale, extra) for text in self._sides.texts]

    def guide(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """One prediction of the outputs for `lanes`, (1, C, h, w) each: see `Sides.guide`."""
        assert self._sides is not None, "lanes come before their outputs"
        return self._sides.guide(outputs, self.request.cfg_scale)

    def drift(self) -> torch.Tensor | None:
        """See `StepCache.drift`; None without a cache. Predictions for another text serve no more."""
        if self.cache is None:
            return None
        if self._sides is not None and not self._sides.same(self.texts.schedule.at(self.track.step)):
            self.cache.restart()
        return self.cache.drift(self.model_input())

    def reusable(self, drift: float) -> bool:
        return self.cache is not None and self.cache.reusable(drift)

    def reuse(self, drift: float) -> None:
        """One forward pass of the sampler on the prediction of an earlier one."""
        assert self.cache is not None, "without a cache nothing is reusable"
        self._move(self.cache.reuse(self.model_input(), drift))

    def advance(self, prediction: torch.Tensor) -> None:
        """One forward pass of the sampler."""
        if self.cache is not None:
            self.cache.made(self.model_input(), prediction)
        self._move(prediction)

    def _move(self, prediction: torch.Tensor) -> None:
        """The sampler's step; then, inpainting without a U-Net for it, the unmasked part is put back at the noise of
        the next step."""
        before, self._input = self.latents, None
        if self.request.preview_every:
            self.original = self._keep(self.track.original(prediction, before), 1.0, 0.0)
        self.latents = self.track.advance(prediction, before, self.start.generator)
        if self.start.mask is not None:
            self.latents = self._keep(self.latents, *((1.0, 0.0) if self.track.ended else self.track.mixture()))

    def _keep(self, latents: torch.Tensor, a: torch.Tensor | float, b: torch.Tensor | float) -> torch.Tensor:
        mask, image = self.start.mask, self.start.image
        if mask is None or image is None:
            return latents
        return (1 - mask) * (a * image + b * self.start.noise) + mask * latents
