"""The estimate of an image's working memory against the published architectures: every tensor of a forward pass counted
while it lives, without computing any of it (torch's meta device)."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from serve.diffusion.vae import TILE
from serve.placements import DECODE_TENSORS, DECODE_TILE_PIXELS, STEP_TENSORS


class Living(TorchDispatchMode):
    """Owns: the count of the bytes that a forward pass has alive, and of the most so far."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._now = self.peak = 0
        self._known = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


@pytest.fixture(autouse=True)
def fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where it keeps no matrix of all pairs; the meta device knows only the form that does."""

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.empty_like(query)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention)


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def peak(build: Callable[[], nn.Module], call: Callable[[Any], Any]) -> int:
    with torch.device("meta"), torch.no_grad():
        model = build().eval()
        with Living(model) as living:
            call(model)
    return living.peak


SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {
    "num_layers": 3,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
FLUX = {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True}
"""Fewer layers than are published, for SD 3 and FLUX: each frees what the one before it had."""


def step(model: Any) -> Any:
    """One step of one guided image of 1024 x 1024; FLUX has one lane."""
    if isinstance(model, FluxTransformer2DModel):
        ids = {"img_ids": empty(4096, 3), "txt_ids": empty(512, 3)}
        vectors = {"pooled_projections": empty(1, 768), "timestep": empty(1), "guidance": empty(1)}
        return model(hidden_states=empty(1, 4096, 64), encoder_hidden_states=empty(1, 512, 4096), **vectors, **ids)
    if isinstance(model, SD3Transformer2DModel):
        return model(empty(2, 16, 128, 128), empty(2, 333, 4096), empty(2, 2048), empty(2))
    added = {"text_embeds": empty(2, 1280), "time_ids": empty(2, 6)}
    width = model.config.cross_attention_dim
    return model(empty(2, 4, 128, 128), empty(2), empty(2, 77, width), added_cond_kwargs=added)


@pytest.mark.parametrize(
    ("build", "width", "patches", "lanes"),
    [
        (lambda: UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8), 320, 128 * 128, 2),
        (lambda: UNet2DConditionModel(**SDXL), 320, 128 * 128, 2),
        (lambda: SD3Transformer2DModel(**SD3, in_channels=16, joint_attention_dim=4096), 1536, 64 * 64, 2),
        (lambda: FluxTransformer2DModel(**FLUX), 3072, 64 * 64, 1),
    ],
    ids=["sd", "sdxl", "sd3", "flux"],
)
def test_a_step_stays_within_the_estimate(build: Callable[[], nn.Module], width: int, patches: int, lanes: int) -> None:
    tensors = peak(build, step) / (4 * width * patches * lanes)
    assert STEP_TENSORS / 3 < tensors <= STEP_TENSORS


def test_a_decoding_is_what_the_estimate_says() -> None:
    def build() -> AutoencoderKL:
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        return AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2)

    tensors = peak(build, lambda vae: vae.decode(empty(1, 4, 128, 128))) / (4 * 128 * 1024 * 1024)
    assert DECODE_TENSORS - 0.5 < tensors <= DECODE_TENSORS + 0.01


def test_the_vae_decodes_in_tiles_beyond_what_the_estimate_says() -> None:
    assert TILE**2 == DECODE_TILE_PIXELS
