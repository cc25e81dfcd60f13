"""Latents and their steps: the tensors behind the rows."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from serve.devices import claim_device, device_errors, use_threads
from serve.diffusion.families import SdFamily
from serve.diffusion.scheduler import Row
from serve.domain import Conditioning, ImageRequest
from serve.errors import GenerationFailed
from serve.models import ModelFolder
from serve.settings import DiffusionSettings


@dataclass(slots=True)
class _ImageState:
    """One image in the making. `latents` is (1, C, H, W); the generator and the scheduler are this image's alone."""

    latents: torch.Tensor
    scheduler: Any
    generator: torch.Generator
    positive: torch.Tensor
    negative: torch.Tensor | None
    guidance_scale: float
    step: int = 0

    @property
    def timestep(self) -> torch.Tensor:
        timestep: torch.Tensor = self.scheduler.timesteps[self.step]
        return timestep

    def advance(self, prediction: torch.Tensor) -> None:
        """One step of the sampler. Those that add noise take the image's own generator, the others take none."""
        step = self.scheduler.step
        noise = {"generator": self.generator} if "generator" in inspect.signature(step).parameters else {}
        self.latents = step(prediction, self.timestep, self.latents, **noise, return_dict=False)[0]
        self.step += 1


class Runner:
    """Begin, step and finish images.

    Owns: the denoiser, the VAE, and every image's latents, scheduler and random generator.
    """

    def __init__(self, family: SdFamily) -> None:
        self._family = family
        self._states: dict[Row, _ImageState] = {}

    def rows(self, run_id: str, request: ImageRequest) -> list[Row]:
        """The request's images as rows of the step batch."""
        factor = self._family.vae_scale_factor
        shape = (request.height // factor, request.width // factor)
        steps = self._family.forwards(request.num_inference_steps)
        return [Row(run_id, index, steps, shape) for index in range(request.num_images)]

    def begin(self, row: Row, request: ImageRequest, conditioning: Conditioning) -> None:
        """Draw the starting noise as diffusers' pipelines do: on the CPU, from the seed, in the model's dtype."""
        family = self._family
        scheduler = family.new_scheduler(request.num_inference_steps)
        generator = torch.Generator("cpu").manual_seed(request.seed + row.index)
        noise = torch.randn((1, family.latent_channels, *row.shape), generator=generator, dtype=family.dtype)
        self._states[row] = _ImageState(
            latents=noise.to(family.device) * scheduler.init_noise_sigma,
            scheduler=scheduler,
            generator=generator,
            positive=self._context(conditioning.positive),
            negative=None if conditioning.negative is None else self._context(conditioning.negative),
            guidance_scale=request.guidance_scale,
        )

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> dict[Row, Exception]:
        """One denoising step of every row in one forward pass; rows may be at different timesteps and guidance.

        Guided rows stand in the batch twice (Ho & Salimans 2022: eps = eps_u + w (eps_c - eps_u)).
        Returns the rows that failed by themselves. Raises OutOfMemory or GenerationFailed when the forward failed; no
        row has moved then, and fewer of them may be tried. DeviceLost: no more of anything.
        """
        states = [self._states[row] for row in rows]
        with device_errors("the denoiser"):
            predictions = self._predict(states)
        failed: dict[Row, Exception] = {}
        for row, state, prediction in zip(rows, states, predictions, strict=True):
            try:
                state.advance(prediction)
            except Exception as error:  # noqa: BLE001  a sampler's trouble is its own image's alone
                failed[row] = error
        return failed

    @torch.inference_mode()
    def finish(self, row: Row) -> Image.Image:
        """Decode the image and let go of its latents. Raises GenerationFailed rather than give a black picture."""
        state = self._states.pop(row)
        with device_errors("the denoiser"):
            pixels = self._family.decode(state.latents)[0]
        if not torch.isfinite(pixels).all():
            raise GenerationFailed("the image came out as not-a-number; try other parameters")
        pixels = (pixels / 2 + 0.5).clamp(0, 1)
        return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())

    def drop(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._states.pop(row, None)

    def _context(self, embedding: torch.Tensor) -> torch.Tensor:
        return embedding.to(self._family.device, self._family.dtype).unsqueeze(0)

    def _predict(self, states: Sequence[_ImageState]) -> list[torch.Tensor]:
        inputs = [state.scheduler.scale_model_input(state.latents, state.timestep) for state in states]
        guided = [i for i, state in enumerate(states) if state.negative is not None]
        order = guided + list(range(len(states)))
        context = [state.negative for state in states if state.negative is not None] + [s.positive for s in states]
        timesteps = torch.stack([states[i].timestep for i in order]).to(self._family.device)
        out = self._family.predict(torch.cat([inputs[i] for i in order]), timesteps, torch.cat(context))
        rows = out.unsqueeze(1).unbind()
        unconditional = dict(zip(guided, rows[: len(guided)], strict=True))
        predictions = []
        for i, conditional in enumerate(rows[len(guided) :]):
            base = unconditional.get(i)
            predictions.append(conditional if base is None else base + states[i].guidance_scale * (conditional - base))
        return predictions


def open_runner(model: ModelFolder, settings: DiffusionSettings) -> Runner:
    """Load the model as the settings place it. Raises OperatorError naming the setting."""
    device = claim_device(settings.device, settings.num_gpus, "diffusion.device")
    if device.type == "cpu":
        use_threads(settings.torch_threads)
    half = "float32" if device.type == "cpu" else "float16"
    dtype = getattr(torch, half if settings.dtype == "auto" else settings.dtype)
    return Runner(SdFamily(model, device, dtype))
