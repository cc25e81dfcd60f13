"""Embeddings <-> bytes: safetensors, so that what comes back from a cache is data and never code."""

from __future__ import annotations

import torch
from safetensors.torch import load, save

_NAME = "embedding"


def pack(tensor: torch.Tensor) -> bytes:
    """Any dtype, any device; the bytes are the same for equal tensors."""
    return save({_NAME: tensor.detach().cpu().contiguous()})


def unpack(data: bytes) -> torch.Tensor:
    """The tensor that was packed, bit for bit, on the CPU."""
    return load(data)[_NAME]
