"""What SD 3 and FLUX share: a schedule of rectified flow that may depend on the size of the image.

Their img2img and inpainting pipelines list the same timesteps as those for text alone, and then leave the first ones
out: nothing here depends on the task.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any


def calculate_shift(config: Mapping[str, Any], image_seq_len: int, max_shift: float) -> float:
    """The `mu` of an image that the denoiser reads as so many tokens: on a straight line between two sizes. `max_shift`
    is for a sampler's configuration that has none."""
    base_len, max_len = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (max_shift - base_shift) / (max_len - base_len)
    return float(image_seq_len * slope + (base_shift - slope * base_len))


def list_timesteps(
    scheduler: Any, num_inference_steps: int, mu: float | None, sigmas: Sequence[float] | None = None
) -> None:
    """`scheduler.set_timesteps` on the CPU, with `mu` and `sigmas` as far as the sampler's class takes them.

    Stock pipelines refuse a sampler that takes none (`FlowMatchHeunDiscreteScheduler`). Such a one spaces its steps by
    itself here. Where the model's schedule is shifted by the image's size, the sampler's constant shift is set to it:
    the two formulas are one, with shift = e^mu (Esser et al. 2024, https://arxiv.org/abs/2403.03206, 5.3.2), or mu
    where `time_shift_type` is linear.
    """
    takes, config = inspect.signature(scheduler.set_timesteps).parameters, scheduler.config
    if "mu" in takes:
        shift = {} if mu is None else {"mu": mu}
    else:
        shift = {}
        if mu is not None and config.get("use_dynamic_shifting"):
            linear = config.get("time_shift_type") == "linear"
            scheduler.register_to_config(shift=mu if linear else math.exp(mu))
    if sigmas is not None and "sigmas" in takes and not config.get("use_flow_sigmas"):
        scheduler.set_timesteps(sigmas=sigmas, device="cpu", **shift)
    else:
        scheduler.set_timesteps(num_inference_steps, device="cpu", **shift)
