"""The samplers that a request may name, by the names that the field uses. Names only: `serve.diffusion.samplers` builds
them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Process = Literal["diffusion", "flow", "edm"]
"""What a model was trained on: a noise schedule (DDPM, whatever it predicts), rectified flow, or noise levels without a
schedule (EDM, Karras et al. 2022, https://arxiv.org/abs/2206.00364)."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """`label` is AUTOMATIC1111's name, which goes into image files. `cls` is diffusers' class, `options` what differs
    from the model's own scheduler configuration. `most_steps` bounds a request's steps, where the method does. Each
    step makes `order` forward passes, the last one makes one; and `warm_up` are made once on top."""

    label: str
    process: Process
    cls: str
    options: Mapping[str, Any] = field(default_factory=dict)
    most_steps: int | None = None
    order: int = 1
    warm_up: int = 0


_CONSISTENCY_STEPS = 50
"""The steps among which a consistency model was trained to jump: `original_inference_steps`."""
_KARRAS = {"use_karras_sigmas": True}
_DPMPP_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2}
_SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}

SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler("DDIM", "diffusion", "DDIMScheduler"),
    "ddpm": Sampler("DDPM", "diffusion", "DDPMScheduler"),
    "deis": Sampler("DEIS", "diffusion", "DEISMultistepScheduler"),
    "dpm2": Sampler("DPM2", "diffusion", "KDPM2DiscreteScheduler", order=2),
    "dpm2_a": Sampler("DPM2 a", "diffusion", "KDPM2AncestralDiscreteScheduler", order=2),
    "dpmpp_2m": Sampler("DPM++ 2M", "diffusion", "DPMSolverMultistepScheduler", _DPMPP_2M),
    "dpmpp_2m_karras": Sampler("DPM++ 2M Karras", "diffusion", "DPMSolverMultistepScheduler", _DPMPP_2M | _KARRAS),
    "dpmpp_2m_sde": Sampler("DPM++ 2M SDE", "diffusion", "DPMSolverMultistepScheduler", _SDE),
    "dpmpp_2m_sde_karras": Sampler("DPM++ 2M SDE Karras", "diffusion", "DPMSolverMultistepScheduler", _SDE | _KARRAS),
    "euler": Sampler("Euler", "diffusion", "EulerDiscreteScheduler"),
    "euler_karras": Sampler("Euler Karras", "diffusion", "EulerDiscreteScheduler", _KARRAS),
    "euler_a": Sampler("Euler a", "diffusion", "EulerAncestralDiscreteScheduler"),
    "heun": Sampler("Heun", "diffusion", "HeunDiscreteScheduler", order=2),
    "lcm": Sampler("LCM", "diffusion", "LCMScheduler", most_steps=_CONSISTENCY_STEPS),
    "pndm": Sampler("PLMS", "diffusion", "PNDMScheduler", {"skip_prk_steps": True}, warm_up=1),
    "tcd": Sampler("TCD", "diffusion", "TCDScheduler", most_steps=_CONSISTENCY_STEPS),
    "unipc": Sampler("UniPC", "diffusion", "UniPCMultistepScheduler"),
    "unipc_karras": Sampler("UniPC Karras", "diffusion", "UniPCMultistepScheduler", _KARRAS),
    "flow_euler": Sampler("Euler", "flow", "FlowMatchEulerDiscreteScheduler"),
    "flow_heun": Sampler("Heun", "flow", "FlowMatchHeunDiscreteScheduler", order=2),
    "edm_dpmpp_2m": Sampler("DPM++ 2M", "edm", "EDMDPMSolverMultistepScheduler", _DPMPP_2M),
    "edm_euler": Sampler("Euler", "edm", "EDMEulerScheduler"),
}
"""Each is tested against the stock pipelines. LMS is not among them: diffusers' needs scipy."""


def sampler_names(process: Process) -> tuple[str, ...]:
    """What requests to a model of that kind may name."""
    return tuple(name for name, sampler in SAMPLERS.items() if sampler.process == process)


def forwards_of(name: str | None, steps: int) -> int:
    """Forward passes of an image that makes so many steps, at least 1. None, the model's own sampler, and a name that
    isn't known are taken to make one a step."""
    sampler = SAMPLERS.get(name or "")
    if sampler is None:
        return steps
    return 1 + (steps - 1) * sampler.order + sampler.warm_up
