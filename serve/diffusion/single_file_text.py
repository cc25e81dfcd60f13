"""The text encoders of a single-file checkpoint -> folders as transformers saves them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from serve.models.checkpoints import Checkpoint
from serve.models.weight_files import read_header, read_json

_PIPELINES: Mapping[str, str] = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl_refiner": "StableDiffusionXLImg2ImgPipeline",
}
_PREFIXES: Mapping[tuple[str, str], str] = {
    ("sd", "text_encoder"): "cond_stage_model.transformer.",
    ("sdxl", "text_encoder"): "conditioner.embedders.0.transformer.",
    **{
        (family, role): f"text_encoders.{name}.transformer."
        for family, names in {"sd3": ("clip_l", "clip_g", "t5xxl"), "flux": ("clip_l", "t5xxl")}.items()
        for role, name in zip(("text_encoder", "text_encoder_2", "text_encoder_3"), names, strict=False)
    },
}
"""Where an encoder's tensors have the names that transformers gives them. SDXL's second and SD 2's are open_clip's."""
_PROJECTION = "text_projection.weight"


def text_encoder(checkpoint: Checkpoint, role: str, folder: Path, dtype: torch.dtype | None, out: Path) -> None:
    """Write `out`, weights and configuration, with `folder`'s configuration. What is missing is left to `check_folder`.

    `dtype` None leaves every tensor as it is.
    """
    prefix = _PREFIXES.get((checkpoint.family, role))
    names = [name for name in read_header(checkpoint.file) if prefix is not None and name.startswith(prefix)]
    if not names:
        _openclip(checkpoint, role, folder, dtype).save_pretrained(out)
        return
    assert prefix is not None
    with safe_open(checkpoint.file, "pt") as weights:
        tensors = {name.removeprefix(prefix): weights.get_tensor(name) for name in names}
    # Old checkpoints keep `position_ids`, which count from 0 and are no weights.
    tensors = {name: value.to(dtype=dtype) for name, value in tensors.items() if value.is_floating_point()}
    projects = str(read_json(folder / role / "config.json").get("architectures", [""])[0]).endswith("WithProjection")
    if projects and _PROJECTION not in tensors:
        # As in Stability AI's code for SD 3, and in diffusers: without a projection it is one that changes nothing.
        tensors[_PROJECTION] = torch.eye(_width(tensors), dtype=next(iter(tensors.values())).dtype)
    out.mkdir()
    shutil.copy(folder / role / "config.json", out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def _openclip(checkpoint: Checkpoint, role: str, folder: Path, dtype: torch.dtype | None) -> Any:
    index = read_json(folder / "model_index.json")
    others = {name: None for name, entry in index.items() if isinstance(entry, list) and name != role}
    pipeline = getattr(diffusers, _PIPELINES[checkpoint.family]).from_single_file(
        str(checkpoint.file), config=str(folder), torch_dtype=dtype, **others
    )
    return getattr(pipeline, role)


def _width(tensors: Mapping[str, torch.Tensor]) -> int:
    return next(value.shape[-1] for name, value in tensors.items() if name.endswith("token_embedding.weight"))
