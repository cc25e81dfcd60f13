"""The samplers: diffusers' schedulers by the names of `serve.models.samplers`, one object for each image.

Everything that a sampler decides by (timesteps, sigmas, alphas) stays on the CPU, where asking for it stalls no device.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, LCMScheduler
from diffusers import schedulers as diffusers_schedulers

from serve.diffusion.families.base import Family
from serve.domain.orders import ImageRequest, Task
from serve.errors import InvalidRequest
from serve.models.samplers import SAMPLERS

_PAIR = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1), torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)


class FlowMatchHeun(FlowMatchHeunDiscreteScheduler):  # type: ignore[misc]
    """Heun's method on the steps that `FlowMatchEulerDiscreteScheduler` makes of the same configuration.

    diffusers' own class knows one fixed shift; this one also has FLUX's, which depends on the image's size.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        euler = FlowMatchEulerDiscreteScheduler.from_config(dict(self.config))
        euler.set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu)
        times, levels = euler.timesteps, euler.sigmas
        self.num_inference_steps = len(times)
        self.timesteps = torch.cat([times[:1], times[1:].repeat_interleave(2)])
        self.sigmas = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
        self.prev_derivative = None
        self.dt = None
        self._step_index = None
        self._begin_index = None


_OWN: Mapping[str, Any] = {"FlowMatchHeunDiscreteScheduler": FlowMatchHeun}


def new_scheduler(family: Family, name: str | None) -> Any:
    """A diffusers scheduler of its own for one image: the model's, or the named one on the model's configuration.

    As with diffusers' `from_config`, another class takes over what the model's file says, not what the model's own
    class falls back to where the file is silent. Raises InvalidRequest for a name that means nothing to this model.
    """
    built = _BUILT.setdefault(family, {})
    if name not in built:
        built[name] = _build(family, name)
    return copy.deepcopy(built[name])


_BUILT: WeakKeyDictionary[Family, dict[str | None, Any]] = WeakKeyDictionary()
"""Schedulers as built, never stepped: building one costs up to 100 ms (DPM2), copying one half a millisecond."""


def _build(family: Family, name: str | None) -> Any:
    if name is None:
        return family.scheduler_class.from_config(family.scheduler_config)
    sampler = SAMPLERS.get(name)
    assert family.model.denoiser is not None, "a model for text only is never drawn with"
    if sampler is None or sampler.process != family.model.denoiser.process:
        raise InvalidRequest(f"{family.model.name} has no sampler {name}", "scheduler")
    cls = _OWN.get(sampler.cls) or getattr(diffusers_schedulers, sampler.cls)
    written = _written(family.scheduler_class, family.model.path)
    config = {key: family.scheduler_config[key] for key in written & family.scheduler_config.keys()}
    return cls.from_config(config | {"_class_name": family.scheduler_class.__name__}, **sampler.options)


@lru_cache(maxsize=64)
def _written(cls: Any, model: Path) -> frozenset[str]:
    """The options that the model's file names."""
    return frozenset(cls.load_config(model / "scheduler", local_files_only=True))


@lru_cache(maxsize=64)
def _step_options(cls: Any) -> frozenset[str]:
    """Which of the optional arguments the class's `step` takes; asked once for each class, for it is slow."""
    return frozenset(inspect.signature(cls.step).parameters) & {"eta", "generator"}


def _distilled(family: Family) -> bool:
    """Whether it is a latent consistency model, which was trained to jump."""
    denoiser = family.model.denoiser
    return denoiser is not None and denoiser.process == "diffusion" and denoiser.guidance == "embedded"


class Track:
    """One image's way down its timesteps.

    `begin` of the `total` forward passes are left out at the start: an image to start from stands for them. Heun's
    method, DPM2 and PNDM make more forward passes than the client asked for steps.

    Owns: the image's scheduler and its place in it.
    """

    def __init__(self, family: Family, request: ImageRequest, shape: tuple[int, int]) -> None:
        """Raises InvalidRequest where the sampler can't make that many steps."""
        self.scheduler = new_scheduler(family, request.scheduler)
        strength = 1.0 if request.strength is None else request.strength
        kind: Any = type(self.scheduler)
        jumps = request.task is Task.IMG2IMG and kind is LCMScheduler and _distilled(family)
        try:
            if jumps:
                # As the stock pipeline: all of the steps, among the timesteps that the image leaves.
                self.scheduler.set_timesteps(request.num_inference_steps, device="cpu", strength=strength)
            else:
                family.set_timesteps(self.scheduler, request.num_inference_steps, shape)
        except ValueError as error:
            message = f"this sampler can't make {request.num_inference_steps} steps"
            raise InvalidRequest(message, "num_inference_steps") from error
        self.total = len(self.scheduler.timesteps)
        self.begin = 0
        self._steps = request.num_inference_steps
        self._options = _step_options(kind)
        self._flow = not hasattr(self.scheduler, "add_noise")
        if request.task is not Task.TXT2IMG and not jumps:
            self._cut(strength)
        self.done = 0

    def _cut(self, strength: float) -> None:
        """Leave out the first steps as `get_timesteps` of the stock pipelines does; at least one step remains."""
        steps = min(self._steps * strength, self._steps)
        start = int(self._steps - steps) if self._flow else self._steps - int(steps)
        self.begin = min(start, self._steps - 1) * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self.begin)

    @property
    def forwards(self) -> int:
        """Forward passes from the beginning to the end."""
        return self.total - self.begin

    @property
    def ended(self) -> bool:
        return self.done >= self.forwards

    @property
    def step(self) -> int:
        """The client's step that the next forward pass belongs to; steps that an image stands for are counted too."""
        return (self.begin + self.done) * self._steps // self.total

    @property
    def timestep(self) -> torch.Tensor:
        timestep: torch.Tensor = self.scheduler.timesteps[self.begin + self.done]
        return timestep

    def model_input(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents as the denoiser wants them now."""
        if self._flow:
            return latents
        scaled: torch.Tensor = self.scheduler.scale_model_input(latents, self.timestep)
        return scaled

    def advance(self, prediction: torch.Tensor, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The latents one forward pass on. Samplers that add noise draw it from the image's own generator."""
        taken = {"generator": generator, "eta": 0.0}
        options = {key: taken[key] for key in self._options}
        after: torch.Tensor = self.scheduler.step(prediction, self.timestep, latents, **options, return_dict=False)[0]
        self.done += 1
        return after

    def mixture(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, b), 0-dim on the CPU: latents at this point of the schedule are a * image + b * noise.

        The sampler's own `add_noise` is linear in both, so two numbers say all of it, and no device is asked.
        """
        times = self.timestep.reshape(1)
        if self._flow:
            mixed = self.scheduler.scale_noise(_PAIR[0], times, _PAIR[1])
        else:
            mixed = self.scheduler.add_noise(*_PAIR, times.repeat(2))
        return mixed[0, 0, 0, 0], mixed[1, 0, 0, 0]

    def original(self, prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """What the denoiser takes the finished latents to be, judged from `latents` and its prediction for them.

        To be asked before `advance`.
        """
        if self._flow:
            sigma: torch.Tensor = self.timestep / self.scheduler.config.num_train_timesteps
            return latents - sigma * prediction
        if hasattr(self.scheduler, "precondition_outputs"):  # EDM
            level = self.scheduler.sigmas[self.begin + self.done]
            estimate: torch.Tensor = self.scheduler.precondition_outputs(latents, prediction, level)
            return estimate
        a, b = self.mixture()
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return (latents - b * prediction) / a
        if kind == "v_prediction":
            return (a * latents - b * (a**2 + b**2).sqrt() * prediction) / (a**2 + b**2)
        return latents - b * prediction if kind == "flow_prediction" else prediction
