"""What a single-file checkpoint is, told by the names of its tensors. No tensor is read.

Names are those that people have: Stability AI's and Black Forest Labs' own, and ComfyUI's where it puts text encoders
and VAE beside a transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from serve.models.weight_files import TensorInfo, read_header, refused

_UNET = ("model.diffusion_model.input_blocks.",)
_VAE = ("first_stage_model.", "vae.")
LAYOUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sd": {"unet": _UNET, "vae": _VAE, "text_encoder": ("cond_stage_model.",)},
    "sdxl": {
        "unet": _UNET,
        "vae": _VAE,
        "text_encoder": ("conditioner.embedders.0.",),
        "text_encoder_2": ("conditioner.embedders.1.",),
    },
    "sdxl_refiner": {"unet": _UNET, "vae": _VAE, "text_encoder_2": ("conditioner.embedders.0.",)},
    "sd3": {
        "transformer": ("model.diffusion_model.joint_blocks.", "joint_blocks."),
        "vae": _VAE,
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
    },
    "flux": {
        "transformer": ("model.diffusion_model.double_blocks.", "double_blocks."),
        "vae": _VAE,
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.t5xxl.",),
    },
}
"""Family -> part -> how the names of its tensors may begin."""
_WORDS = {"unet": "U-Net", "transformer": "transformer", "vae": "VAE"}
_FOREIGN = {
    ("lora_", ".lora_down.", ".lora_up.", ".lora_A.", ".lora_B."): "a LoRA, which changes a model and is none",
    ("control_model.", "controlnet_", "input_hint_block."): "a ControlNet, which steers a model and is none",
    (".absmax", ".quant_state", "scaled_fp8", ".scaled_fp8", ".scale_weight"): "quantized with scales",
    ("distilled_guidance_layer.", ".distilled_guidance_layer."): "a Chroma, which is not served",
    ("double_layers.", "model.double_layers."): "an AuraFlow, which is served from a diffusers folder alone",
}
"""Told by the beginning of a name or, with a dot before it, by a part of one."""
_LABEL = "model.diffusion_model.label_emb.0.0.weight"
_REFINER_LABEL = 2560
"""Width of what the refiner's U-Net reads beside the text: the pooled text and five numbers, each as 256."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`parts` are the roles, as folders of the diffusers layout name them, that the file has tensors of."""

    file: Path
    family: str
    parts: frozenset[str]

    @property
    def lacking(self) -> tuple[str, ...]:
        """What has to come from elsewhere."""
        return tuple(part for part in LAYOUTS[self.family] if part not in self.parts)


def recognised(file: Path) -> Checkpoint:
    """Raises OperatorError where the file is not a denoiser, with or without the other parts, of a known family."""
    tensors = read_header(file)
    for beginnings, what in _FOREIGN.items():
        found = next((name for name in tensors if _tells(name, beginnings)), None)
        if found is not None:
            raise refused(f"{file} is {what}: it holds {found}")
    family = _family(file, tensors)
    parts = {part for part, beginnings in LAYOUTS[family].items() if _any(tensors, beginnings)}
    return Checkpoint(file, family, frozenset(parts))


def says(family: str, part: str) -> str:
    """A part in words, with the beginning of its tensors' names in such files."""
    return f"{_WORDS.get(part, part)} ({LAYOUTS[family][part][0]}*)"


def _family(file: Path, tensors: Mapping[str, TensorInfo]) -> str:
    has = {family: _any(tensors, _denoiser(family)) for family in LAYOUTS}
    if has["flux"]:
        return "flux"
    if has["sd3"]:
        return "sd3"
    if not has["sd"]:
        wanted = " or ".join(dict.fromkeys(f"{_denoiser(family)[-1]}*" for family in LAYOUTS))
        raise refused(
            f"{file} is not a checkpoint of a Stable Diffusion or FLUX: it has no U-Net or transformer ({wanted})"
        )
    if _any(tensors, ("conditioner.embedders.1.",)):
        return "sdxl"
    if _any(tensors, ("conditioner.embedders.0.model.",)):
        return "sdxl_refiner"
    if _LABEL in tensors:
        return "sdxl_refiner" if tensors[_LABEL].shape[-1:] == (_REFINER_LABEL,) else "sdxl"
    return "sd"


def _denoiser(family: str) -> tuple[str, ...]:
    return next(beginnings for part, beginnings in LAYOUTS[family].items() if part in ("unet", "transformer"))


def _tells(name: str, signs: tuple[str, ...]) -> bool:
    return any(sign in name if sign.startswith(".") else name.startswith(sign) for sign in signs)


def _any(tensors: Mapping[str, TensorInfo], beginnings: tuple[str, ...]) -> bool:
    return any(name.startswith(beginnings) for name in tensors)
