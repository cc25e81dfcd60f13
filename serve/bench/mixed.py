"""What many users order at once: steps, guidance, samplers, sizes and seeds all differ. The seed fixes all of it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.domain.orders import ImageRequest
from serve.models import ModelFolder
from serve.models.denoiser import Guidance
from serve.models.presets import presets
from serve.models.samplers import sampler_names

STEPS = (4, 8, 12, 20, 20, 20, 30, 50)
"""Of equal weight: 20 is what most clients send by default."""
RATIOS = ("1:1", "1:1", "1:1", "3:2", "2:3", "16:9")
GUIDANCE = (1.5, 12.0)
"""Between these, evenly, where the image is guided."""
UNGUIDED = 0.15
"""The share of images without guidance, which take half of the work of the others."""
SAMPLERS = ("dpmpp_2m_karras", "euler_a", "ddim", "unipc", "euler", "flow_euler", "edm_euler", "edm_dpmpp_2m")


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one model can be asked for. `sizes` are (width, height) by aspect ratio."""

    model: str
    sizes: Mapping[str, tuple[int, int]]
    samplers: Sequence[str]
    guidance: Guidance
    default_guidance_scale: float

    @classmethod
    def of(cls, model: ModelFolder) -> Offer:
        assert model.denoiser is not None
        return cls(
            model=model.name,
            sizes=presets(model.denoiser, model.family),
            samplers=sampler_names(model.denoiser.process),
            guidance=model.denoiser.guidance,
            default_guidance_scale=model.denoiser.default_guidance_scale,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What images are drawn from, each value of equal weight. `sizes` are (width, height), or None for the model's own
    sizes of `ratios`; of `samplers` those that the model has."""

    steps: Sequence[int] = STEPS
    ratios: Sequence[str] = RATIOS
    sizes: Sequence[tuple[int, int]] | None = None
    guidance: tuple[float, float] = GUIDANCE
    unguided: float = UNGUIDED
    samplers: Sequence[str] = SAMPLERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One image of a mix."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str


def draw(mix: Mix, offer: Offer, rng: random.Random) -> Drawn:
    """Raises ValueError where the model has none of the mix's samplers or ratios."""
    sizes = mix.sizes or [offer.sizes[ratio] for ratio in mix.ratios if ratio in offer.sizes]
    samplers = [name for name in mix.samplers if name in offer.samplers]
    if not sizes:
        raise ValueError(f"{offer.model} has none of the aspect ratios {', '.join(mix.ratios)}")
    if not samplers:
        raise ValueError(f"{offer.model} has none of the samplers {', '.join(mix.samplers)}")
    width, height = rng.choice(sizes)
    return Drawn(
        width=width,
        height=height,
        num_inference_steps=rng.choice(mix.steps),
        guidance_scale=_guidance(mix, offer, rng),
        scheduler=rng.choice(samplers),
    )


def _guidance(mix: Mix, offer: Offer, rng: random.Random) -> float:
    if offer.guidance == "classifier_free":
        return rng.uniform(*mix.guidance) if rng.random() >= mix.unguided else 1.0
    return offer.default_guidance_scale if offer.guidance == "embedded" else 1.0


def mixed_orders(model: ModelFolder, prompts: Sequence[str], count: int, seed: int) -> list[ImageRequest]:
    """`count` images of one model. Guidance lies between 1 and 12 where the model has it."""
    rng = random.Random(f"mixed/{seed}")
    offer, mix = Offer.of(model), Mix()
    orders = []
    for index in range(count):
        drawn = draw(mix, offer, rng)
        orders.append(
            ImageRequest(
                model=model.name,
                prompt=rng.choice(prompts),
                width=drawn.width,
                height=drawn.height,
                num_inference_steps=drawn.num_inference_steps,
                guidance_scale=drawn.guidance_scale,
                true_cfg_scale=None if offer.guidance == "classifier_free" else 1.0,
                seed=seed * 1_000_003 + index,
                scheduler=drawn.scheduler,
            )
        )
    return orders
