"""FLUX.1 in Black Forest Labs' key layout (https://github.com/black-forest-labs/flux) -> diffusers'.

Diffusers' own mapping takes every FLUX to be 3072 wide; this one goes by the tensors, so that smaller ones convert too,
and holds no tensor twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_PREFIX = "model.diffusion_model."
_NAMES: Mapping[str, str] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE: Mapping[str, str] = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_SINGLE: Mapping[str, str] = {
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "linear2": "proj_out",
}
_FUSED: Mapping[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
"""Layers that are one matrix there and several here. The last of `linear1` is what remains after three squares."""
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)\.(weight|bias|scale)")


def flux_transformer(file: Path, cls: Any, config: Mapping[str, Any], dtype: torch.dtype | None) -> Any:
    """A `FluxTransformer2DModel` of exactly the tensors that `config` promises. Raises ValueError that names one that
    is missing, foreign or of another shape."""
    with torch.device("meta"):
        model = cls.from_config(config)
    width = model.inner_dim
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(file, "pt") as weights:
        names = list(weights.keys())
        prefix = _PREFIX if any(name.startswith(_PREFIX) for name in names) else ""
        for name in names:
            if name.startswith(prefix):
                tensor = weights.get_tensor(name).to(dtype=dtype)
                tensors |= dict(flux_tensors(name.removeprefix(prefix), tensor, width))
    _check(model.state_dict(), tensors)
    model.load_state_dict(tensors, assign=True)
    return model


def _check(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"the checkpoint lacks {missing[0]} (as diffusers calls it) and {len(missing) - 1} more")
    if foreign := [name for name in found if name not in expected]:
        raise ValueError(f"the configuration does not explain {foreign[0]} and {len(foreign) - 1} more")
    for name, tensor in found.items():
        if tensor.shape != (shape := expected[name].shape):
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, its configuration says {list(shape)}")


def flux_tensors(name: str, tensor: torch.Tensor, width: int) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor of the file as diffusers names it, or as the several that it is there; `width` is the transformer's.

    A name that is not FLUX's stays as it is.
    """
    found = _BLOCK.fullmatch(name)
    if found is None:
        layer, _, kind = name.rpartition(".")
        if layer == "final_layer.adaLN_modulation.1":
            # Diffusers' AdaLayerNormContinuous reads scale before shift.
            shift, scale = tensor.chunk(2)
            tensor = torch.cat([scale, shift])
        yield f"{_NAMES.get(layer, layer)}.{kind}", tensor
        return
    side, block, layer, kind = found.groups()
    place = f"{'single_' if side == 'single' else ''}transformer_blocks.{block}."
    kind = "weight" if kind == "scale" else kind
    if (parts := _FUSED.get(layer)) is None:
        yield f"{place}{(_SINGLE if side == 'single' else _DOUBLE).get(layer, layer)}.{kind}", tensor
        return
    sizes = [width] * 3 + [len(tensor) - 3 * width] * (len(parts) - 3)
    for part, piece in zip(parts, tensor.split(sizes), strict=True):
        yield f"{place}{part}.{kind}", piece.clone()
