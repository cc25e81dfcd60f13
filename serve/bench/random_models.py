"""Published models with random weights: real shapes, without a file or a hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, schedulers
from torch import nn

from serve.diffusion.engine import Engine, OnRelief, Work
from serve.diffusion.families import family_class
from serve.diffusion.families.base import Family
from serve.diffusion.families.speed import compile_family, remember_signatures
from serve.diffusion.runner import Runner
from serve.diffusion.synthetic import synthetic_text
from serve.diffusion.vae import Vae
from serve.domain.conditioning import Phase, Schedule
from serve.domain.orders import ImageRequest, Task
from serve.memory.terms import ModelShape
from serve.models import Denoiser, ModelFolder
from serve.models.denoiser_configs import KINDS, Config
from serve.rungs import Rung
from serve.settings.pools import DiffusionSettings

STEPS, GUIDANCE = 20, 4.0
SPREAD = 0.02
"""Standard deviation of weights: small enough that no activation overflows float16 on its way through the layers."""
_NOISE = 1 << 20
_SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "diffusion": (
        "EulerDiscreteScheduler",
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    ),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
}
"""By what the model was trained on; which one it is takes no memory and next to no time."""


def random_family(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, rung: Rung, *, compiled: bool = False
) -> Family:
    """The model as the server would hold it on that rung. Its weights are made in the machine's memory and go from
    there to the device as those of a file do. Raises OutOfMemory, OperatorError where the rung needs a library."""
    cls: Any = family_class(shape.family)

    class Random(cls):  # type: ignore[misc]
        """The family over weights that are made instead of read."""

        def load_denoiser(self) -> Any:
            denoiser = random_module(lambda: self.part_class.from_config(dict(shape.denoiser)), self.dtype)
            remember_signatures(denoiser)
            return denoiser.to(memory_format=torch.channels_last) if self.convolutional else denoiser

        def load_scheduler(self) -> tuple[Any, dict[str, Any]]:
            name, options = _SAMPLERS[KINDS[shape.family].process]
            sampler = getattr(schedulers, name)
            return sampler, dict(sampler(**options).config)

        def load_vae(self, settings: DiffusionSettings) -> Vae:
            vae = random_module(lambda: AutoencoderKL.from_config(dict(shape.vae)), self.dtype)
            vae.to(memory_format=torch.channels_last)
            return Vae(vae, self.device, self.dtype, upcast=self.upcasts_vae)

    family: Family = Random(folder_of(shape), device, dtype, DiffusionSettings(), rung)
    if compiled:
        compile_family(family)
    return family


def random_module(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    """The model that `build` makes, on the CPU, in eval mode. Every weight matrix holds the same noise, over and over,
    which takes a fraction of the time that drawing billions of numbers does; norms are ones."""
    with torch.device("meta"):
        module = build()
    # nn.Module's own: diffusers' warns of every cast.
    nn.Module.to(module, dtype).to_empty(device="cpu")
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0)).mul_(SPREAD).to(dtype)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        _fill(name, tensor.data, noise)
    return module.eval().requires_grad_(False)


def folder_of(shape: ModelShape) -> ModelFolder:
    """What the engine knows of the model, but for its files and its text encoders, which there are not."""
    reading = KINDS[shape.family].read(Config(Path(shape.name), shape.denoiser), shape.family)
    factor = shape.vae_scale_factor
    denoiser = Denoiser(
        default_width=shape.default_width,
        default_height=shape.default_height,
        size_multiple=shape.size_multiple,
        vae_scale_factor=factor,
        latent_channels=shape.vae["latent_channels"],
        in_channels=reading.in_channels,
        prediction_type="flow_prediction" if KINDS[shape.family].process == "flow" else "epsilon",
        process=KINDS[shape.family].process,
        guidance=reading.guidance,
        tasks=frozenset(Task),
        default_num_inference_steps=STEPS,
        default_guidance_scale=GUIDANCE,
        default_strength=0.8,
        largest_side=None if reading.largest_side is None else reading.largest_side * factor,
    )
    return ModelFolder(
        name=shape.name,
        path=Path(shape.name),
        family=shape.family,
        text=(),
        context_width=reading.context[1],
        zero_empty_negative=False,
        denoiser=denoiser,
    )


def random_work(runner: Runner, shape: ModelShape, size: tuple[int, int], seed: int, steps: int) -> Work:
    """An image whose text is noise, with guidance where the model's default has it."""
    family = runner.family
    text, ids = synthetic_text(family, torch.Generator().manual_seed(seed))
    negative, _ = synthetic_text(family, torch.Generator().manual_seed(seed + 1))
    request = ImageRequest(
        model=shape.name,
        prompt="",
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        true_cfg_scale=None if shape.guided else 1.0,
        seed=seed,
    )
    phase = Phase(0, ((1.0, ((1.0, 0),)),), ((1.0, 1),) if shape.guided else None)
    schedule = Schedule((text, negative) if shape.guided else (text,), (phase,), ids, ids if shape.guided else None)
    return Work(f"bench-{seed}-{steps}", request, schedule)


def latents_of(shape: ModelShape, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the latents of an image of (width, height)."""
    return size[1] // shape.vae_scale_factor, size[0] // shape.vae_scale_factor


def size_of(shape: ModelShape) -> tuple[int, int]:
    """Width and height that the model is made for."""
    return shape.default_width, shape.default_height


def draw(engine: Engine, works: Sequence[Work], on_relief: OnRelief = lambda relief: None) -> None:
    """All of them, to the end. Raises what the first of them fails with."""
    futures = [engine.submit(work, lambda event: None, None, on_relief) for work in works]
    for future in futures:
        future.result()


def _fill(name: str, tensor: torch.Tensor, noise: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        tensor.zero_()
    elif tensor.dim() < 2:
        tensor.fill_(1.0 if name.endswith("weight") else 0.0)
    else:
        flat = tensor.view(-1)
        for first in range(0, flat.numel(), len(noise)):
            part = flat[first : first + len(noise)]
            part.copy_(noise[: len(part)])
