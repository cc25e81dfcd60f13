"""Linear layers with their weights in 8 or 4 bits, by bitsandbytes' block-wise kernels, on CPUs and GPUs.

Only weights are quantized. Activations stay as they are, so that a row's result can't depend on its neighbours, and
so that nothing of T5, whose activations have outliers, is lost in them.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

BLOCK = {8: 128, 4: 64}
"""Bits -> weights that share one float32 scale: 8.25 and 4.5 bits a weight in all."""
BITS = {"int8": 8, "int4": 4}


class BlockwiseLinear(nn.Module):
    """`nn.Linear` that keeps its weight in blocks of few bits, and unpacks it for each product.

    8 bits: 255 steps from -1 to 1 of the block's largest magnitude. 4 bits: NF4, 16 steps at quantiles of the normal
    distribution (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314). The product is computed in the dtype that
    the weight had: so float32 for the layers of T5 that are kept in it.
    """

    bias: nn.Parameter | None

    def __init__(
        self, linear: nn.Linear | BlockwiseLinear, bits: int, device: torch.device, steps: torch.Tensor | None
    ) -> None:
        """`steps` are the 8-bit values, sorted, shared by all layers. Raises ValueError where bitsandbytes does."""
        super().__init__()
        weight = linear.unpacked() if isinstance(linear, BlockwiseLinear) else linear.weight.detach()
        weight = weight.to(device).contiguous()
        block, functional = BLOCK[bits], load_library().functional
        if bits == 8:
            packed, state = functional.quantize_blockwise(weight, code=steps, blocksize=block)
        else:
            packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
        self.bits = bits
        self.shape = tuple(weight.shape)
        self.dtype = weight.dtype
        self.packed = nn.Buffer(packed)
        self.scales = nn.Buffer(state.absmax)
        self.register_buffer("steps", steps)  # the one tensor of all layers, which a new Buffer would not be
        bias: torch.Tensor | None = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=False)
        # transformers asks T5's layers for their weight's dtype, and leaves those alone that have no weight.
        self.register_parameter("weight", None)

    def unpacked(self) -> torch.Tensor:
        """The weight as the product sees it, (out, in)."""
        ops = torch.ops.bitsandbytes
        block = BLOCK[self.bits]
        if self.bits == 8:
            weight = ops.dequantize_blockwise(self.packed, self.scales, self.steps, block, self.dtype)
        else:
            weight = ops.dequantize_4bit(self.packed, self.scales, block, "nf4", self.shape, self.dtype)
        matrix: torch.Tensor = weight.view(self.shape)
        return matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.to(self.dtype), self.unpacked(), self.bias)


def quantize(layers: Sequence[nn.Module], bits: int, device: torch.device) -> None:
    """Replace every linear layer inside `layers` that has more bits, one after the other, so that `device` holds no
    more than one of them unpacked. Embeddings, norms and projections stay as they are: they are small, or read by
    index. If it raises, each layer is whole, as it was or replaced."""
    steps = load_library().functional.create_linear_map(signed=True).to(device) if bits == 8 else None
    for layer in layers:
        # Names and not modules, which would keep the weights of those that are replaced.
        for name in [name for name, module in layer.named_modules() if _has_more_bits(module, bits)]:
            parent, _, child = name.rpartition(".")
            linear: Any = layer.get_submodule(name)
            setattr(layer.get_submodule(parent), child, BlockwiseLinear(linear, bits, device, steps))


def packed(model: nn.Module) -> tuple[str, ...]:
    """What the weights of its layers were packed to: names of `BITS`, none of a model that is whole."""
    found = {module.bits for module in model.modules() if isinstance(module, BlockwiseLinear)}
    return tuple(name for name, bits in BITS.items() if bits in found)


def _has_more_bits(module: nn.Module, bits: int) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, BlockwiseLinear) and module.bits > bits)


def load_library() -> Any:
    """bitsandbytes. Raises ImportError where it is not installed.

    On some CPUs it would fetch machine code from the hub where the package `kernels` is installed, for an operation
    that is not used here; a server must not run what nobody chose.
    """
    if (loaded := sys.modules.get("bitsandbytes")) is not None:
        return loaded
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    disabled, logger.disabled = logger.disabled, True  # its warning that there are no kernels
    try:
        with unseen("kernels"):
            return importlib.import_module("bitsandbytes")
    finally:
        logger.disabled = disabled


@contextmanager
def unseen(package: str) -> Iterator[None]:
    """Meanwhile an import of the package fails, and who asks hears that it is not installed."""
    before = sys.modules.get(package)
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
        if before is not None:
            sys.modules[package] = before
