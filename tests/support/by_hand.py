"""A job drawn by a loop of its own, one lane at a time, its guidance written out; and jobs over texts made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from PIL import Image

from serve.diffusion.engine import Work
from serve.diffusion.families.base import Lane, Text
from serve.diffusion.runner import Latents, Runner
from serve.diffusion.samplers import Track
from serve.diffusion.state import start_from_noise
from serve.domain.conditioning import Mix, Phase, Schedule, TextEmbedding

Composed = Sequence[tuple[float, torch.Tensor]]
Said = Callable[[int], tuple[Composed, torch.Tensor]]
"""Step of the client's -> weights and contexts, and the negative context."""


def one(*mix: tuple[float, int]) -> tuple[tuple[float, Mix], ...]:
    """A prompt that is no composition."""
    return ((1.0, mix),)


def with_texts(job: Work, texts: Sequence[torch.Tensor], *phases: Phase) -> Work:
    schedule = Schedule(tuple(TextEmbedding(context) for context in texts), phases)
    return replace(job, request=replace(job.request, composed=len(phases[0].positive)), schedule=schedule)


def by_hand(runner: Runner, job: Work, said: Said) -> Image.Image:
    """The job's first image, its guidance written out."""
    family, request = runner.family, job.request
    shape = request.height // family.vae.scale_factor, request.width // family.vae.scale_factor
    with torch.inference_mode():
        track = Track(family, request, shape)
        start = start_from_noise(family, request, 0, shape)
        latents = start.noise * track.scheduler.init_noise_sigma
        while not track.ended:
            inputs = track.model_input(latents)
            composed, negative = said(track.step)
            contexts = [negative, *(context for _, context in composed)]
            base, *outputs = (
                family.predict([Lane(inputs, track.timestep, Text(each), request.guidance_scale)]) for each in contexts
            )
            prediction = base.clone()
            for (weight, _), output in zip(composed, outputs, strict=True):
                prediction += request.guidance_scale * weight * (output - base)
            latents = track.advance(prediction, latents, start.generator)
    image = runner.decode(Latents(latents, None, tiny=False))
    assert isinstance(image, Image.Image)
    return image
