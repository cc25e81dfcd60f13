"""A1111's words for what ours mean, as both passes of an order need them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from serve.api.sdapi_schemas import Drawing
from serve.models.a1111 import sampler_named
from serve.offers import ModelInfo

OVERRIDES = "override_settings."
NAMES: Mapping[str, str] = {
    "model": f"{OVERRIDES}sd_model_checkpoint",
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "true_cfg_scale": "cfg_scale",
    "num_images": "batch_size",
    "scheduler": "sampler_name",
    "image": "init_images",
    "strength": "denoising_strength",
    "variation_seed": "subseed",
    "variation_strength": "subseed_strength",
    "clip_skip": f"{OVERRIDES}CLIP_stop_at_last_layers",
}
"""A1111's names of our fields, where they differ."""

_NAMED_BRACES = re.compile(r"(?<!\\)\{([A-Za-z_][A-Za-z0-9_]{0,63})\}")


def braced(text: str) -> str:
    r"""In A1111 `{word}` is text; here it would be a variable. `{red|blue}` stays a choice, which is nothing there but
    to those who have an extension for it."""
    return _NAMED_BRACES.sub(r"\\{\1\\}", text)


def sampler(info: ModelInfo | None, name: str | None, scheduler: str | None) -> str | None:
    """Ours. Raises InvalidRequest that names `sampler_name` or `scheduler`."""
    return None if info is None else sampler_named(info.schedulers, name, scheduler)


def guidance(order: Drawing, info: ModelInfo | None) -> dict[str, Any]:
    """FLUX has two kinds, as in Forge: `cfg_scale` is the classifier-free one there too."""
    if info is None or info.family != "flux":
        return {"guidance_scale": order.cfg_scale}
    return {"true_cfg_scale": order.cfg_scale, "guidance_scale": order.distilled_cfg_scale}
