"""What the model draws of a concept that is still being learned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from PIL import Image

from serve.diffusion.families.base import Family, Lane
from serve.diffusion.samplers import Track
from serve.domain.orders import ImageRequest
from serve.learning.words import Words
from serve.prompts.families import time_ids


@torch.no_grad()
def draw(family: Family, words: Words, vectors: Mapping[str, torch.Tensor], caption: str, seed: int) -> Image.Image:
    """One picture of the caption, with the model's own sampler, size, steps and guidance. Raises NotFinite."""
    model, denoiser = family.model, family.model.denoiser
    assert denoiser is not None, "a model that is learned with is drawn"
    request = ImageRequest(
        model=model.name,
        prompt=caption,
        width=denoiser.default_width,
        height=denoiser.default_height,
        num_inference_steps=denoiser.default_num_inference_steps,
        guidance_scale=denoiser.default_guidance_scale,
        seed=seed,
    )
    ids, negative_ids = (
        None if each is None else torch.tensor(each) for each in time_ids(model.family, request.height, request.width)
    )
    (positive,) = words.read([caption], vectors)
    texts = [family.text(positive, ids)]
    if request.guided:
        texts.append(family.text(words.nothing(), ids if negative_ids is None else negative_ids))
    factor = family.vae.scale_factor
    shape = request.height // factor, request.width // factor
    track = Track(family, request, shape)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, denoiser.latent_channels, *shape, generator=generator, dtype=family.dtype)
    latents = noise.to(family.device) * track.scheduler.init_noise_sigma
    while not track.ended:
        seen = track.model_input(latents)
        told = family.predict([Lane(seen, track.timestep, text, request.guidance_scale) for text in texts])
        guess = told[:1] if len(texts) == 1 else torch.lerp(told[1:], told[:1], request.cfg_scale)
        latents = track.advance(guess, latents, generator)
    pixels = (family.vae.decode(latents) / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
    return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
