"""What many users order at once: steps, guidance, samplers, sizes and seeds all differ. The seed fixes all of it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from serve.domain import ImageRequest
from serve.models import ModelFolder
from serve.models.presets import presets
from serve.models.samplers import sampler_names

STEPS = (4, 8, 12, 20, 20, 20, 30, 50)
"""Of equal weight: 20 is what most clients send by default."""
RATIOS = ("1:1", "1:1", "1:1", "3:2", "2:3", "16:9")
UNGUIDED = 0.15
"""The share of images without guidance, which take half of the work of the others."""
SAMPLERS = ("dpmpp_2m_karras", "euler_a", "ddim", "unipc", "euler", "flow_euler", "edm_euler", "edm_dpmpp_2m")


def mixed_orders(model: ModelFolder, prompts: Sequence[str], count: int, seed: int) -> list[ImageRequest]:
    """`count` images of one model. Guidance lies between 1 and 12 where the model has it."""
    assert model.denoiser is not None
    rng = random.Random(f"mixed/{seed}")
    sizes = presets(model.denoiser, model.family)
    samplers = [name for name in SAMPLERS if name in sampler_names(model.denoiser.process)]
    orders = []
    for index in range(count):
        width, height = sizes[rng.choice(RATIOS)]
        guided = model.denoiser.guidance == "classifier_free" and rng.random() >= UNGUIDED
        orders.append(
            ImageRequest(
                model=model.name,
                prompt=rng.choice(prompts),
                width=width,
                height=height,
                num_inference_steps=rng.choice(STEPS),
                guidance_scale=rng.uniform(1.5, 12.0)
                if guided
                else model.denoiser.default_guidance_scale
                if model.denoiser.guidance == "embedded"
                else 1.0,
                true_cfg_scale=None if model.denoiser.guidance == "classifier_free" else 1.0,
                seed=seed * 1_000_003 + index,
                scheduler=rng.choice(samplers),
            )
        )
    return orders
