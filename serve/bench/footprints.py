"""The memory of a model's phases, counted: each tensor of a forward pass while it lives. On torch's meta device, where
a model of any size runs in no memory and no time to speak of; or on a real one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from serve.memory.terms import Dtype, ModelShape
from serve.models.denoiser_configs import TIME_IDS

CLASSES: Mapping[str, Any] = {
    "sd": UNet2DConditionModel,
    "sdxl": UNet2DConditionModel,
    "sdxl_refiner": UNet2DConditionModel,
    "sd3": SD3Transformer2DModel,
    "flux": FluxTransformer2DModel,
    "pixart": PixArtTransformer2DModel,
    "auraflow": AuraFlowTransformer2DModel,
}
"""By family."""
Phase = Literal["decode", "encode"]
CONVOLUTION = torch.ops.aten.convolution.default


class Living(TorchDispatchMode):
    """Owns: the count of the bytes of tensors that are alive, those of `model` apart, and of the most so far."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._now = self.peak = 0
        self._known = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        copied = 0
        if func is CONVOLUTION and any(_channels_last(each) for each in args[:2]):  # as cuDNN chooses
            copied = 0 if _channels_last(args[0]) else args[0].nbytes
            result = result.contiguous(memory_format=torch.channels_last)
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._now + copied)
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def _channels_last(tensor: torch.Tensor) -> bool:
    """Laid out so, and not as well contiguous, as what has one channel or one pixel."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


class FusedAttention(TorchFunctionMode):
    """As on a GPU, where attention keeps no matrix of all pairs; the meta device knows only the form that does."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            query = args[0] if args else (kwargs or {})["query"]
            return torch.empty_like(query)
        return func(*args, **(kwargs or {}))


def built(cls: Any, config: Mapping[str, Any], dtype: Dtype, device: str = "meta") -> Any:
    """With random weights; convolutions are laid out as the engine has them."""
    with torch.device(device):
        model = cls.from_config(dict(config)).eval()
    convolutional = cls in (UNet2DConditionModel, AutoencoderKL)
    layout = torch.channels_last if convolutional else torch.preserve_format
    to: Any = nn.Module.to  # diffusers' own warns of every cast
    return to(model, dtype=getattr(torch, dtype), memory_format=layout)


def counted(model: nn.Module, call: Callable[[Any], Any]) -> int:
    """The most bytes that `call(model)` has alive at a time on the meta device, with what it makes and returns."""
    living = Living(model)
    with torch.device("meta"), torch.no_grad(), FusedAttention(), living:
        call(model)
    return living.peak


def allocated(model: nn.Module, call: Callable[[Any], Any]) -> int:
    """The most bytes that `call(model)` has of the CPU's allocator at a time: with what its kernels need."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call(model)
    results: Any = profiled.profiler
    events = [each for each in results.kineto_results.events() if each.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda each: each.start_ns())]
    return max(accumulate(sizes), default=0)


def denoised(shape: ModelShape, dtype: Dtype, width: int, height: int, lanes: int) -> Callable[[Any], Any]:
    """What one step asks of the denoiser, for images of a size in pixels."""
    high, wide = height // shape.vae_scale_factor, width // shape.vae_scale_factor

    def call(model: Any) -> Any:
        def empty(*sides: int) -> torch.Tensor:
            return torch.empty(lanes, *sides, dtype=getattr(torch, dtype))

        return model(timestep=empty(), **_INPUTS[shape.family](shape, high, wide, empty))

    return call


def _unet_inputs(shape: ModelShape, high: int, wide: int, empty: Callable[..., torch.Tensor]) -> dict[str, Any]:
    config = shape.denoiser
    inputs: dict[str, Any] = {
        "sample": empty(config["in_channels"], high, wide),
        "encoder_hidden_states": empty(shape.text_tokens, config["cross_attention_dim"]),
    }
    if shape.family in TIME_IDS:
        ids = TIME_IDS[shape.family]
        pooled = config["projection_class_embeddings_input_dim"] - ids * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {"text_embeds": empty(pooled), "time_ids": empty(ids)}
    return inputs


def _flux_inputs(shape: ModelShape, high: int, wide: int, empty: Callable[..., torch.Tensor]) -> dict[str, Any]:
    config, squares = shape.denoiser, high // 2 * (wide // 2)
    return {
        "hidden_states": empty(squares, config["in_channels"]),
        "encoder_hidden_states": empty(shape.text_tokens, config["joint_attention_dim"]),
        "pooled_projections": empty(config["pooled_projection_dim"]),
        "guidance": empty() if config.get("guidance_embeds") else None,
        "img_ids": torch.empty(squares, 3),
        "txt_ids": torch.empty(shape.text_tokens, 3),
    }


def _sd3_inputs(shape: ModelShape, high: int, wide: int, empty: Callable[..., torch.Tensor]) -> dict[str, Any]:
    pooled = empty(shape.denoiser["pooled_projection_dim"])
    return {**_auraflow_inputs(shape, high, wide, empty), "pooled_projections": pooled}


def _auraflow_inputs(shape: ModelShape, high: int, wide: int, empty: Callable[..., torch.Tensor]) -> dict[str, Any]:
    config = shape.denoiser
    return {
        "hidden_states": empty(config["in_channels"], high, wide),
        "encoder_hidden_states": empty(shape.text_tokens, config["joint_attention_dim"]),
    }


def _pixart_inputs(shape: ModelShape, high: int, wide: int, empty: Callable[..., torch.Tensor]) -> dict[str, Any]:
    config = shape.denoiser
    return {
        "hidden_states": empty(config["in_channels"], high, wide),
        "encoder_hidden_states": empty(shape.text_tokens, config["caption_channels"]),
        "encoder_attention_mask": empty(shape.text_tokens),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


_INPUTS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "sd": _unet_inputs,
    "sdxl": _unet_inputs,
    "sdxl_refiner": _unet_inputs,
    "sd3": _sd3_inputs,
    "flux": _flux_inputs,
    "pixart": _pixart_inputs,
    "auraflow": _auraflow_inputs,
}


def coded(shape: ModelShape, dtype: Dtype, width: int, height: int, tile: int, phase: Phase) -> Callable[[Any], Any]:
    """What the engine asks of the VAE to decode or encode an image of a size in pixels (serve/diffusion/vae.py)."""
    factor, kind = shape.vae_scale_factor, getattr(torch, dtype)

    def call(vae: Any) -> Any:
        vae.use_tiling = width * height > tile * tile
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // factor
        if phase == "encode":
            return vae.encode(torch.empty(1, 3, height, width, dtype=kind)).latent_dist.mode()
        latents = torch.empty(1, shape.vae["latent_channels"], height // factor, width // factor, dtype=kind)
        return vae.decode(latents, return_dict=False)[0][0].float()

    return call
