"""Attention in slices, for the rungs that have next to no memory left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

SCORES = 1 << 24
"""Products of a query with a key that a slice has at most: 64 MiB where they are kept, in float32."""


class SlicedAttention(TorchFunctionMode):
    """While it is entered, torch's attention is computed in slices on this thread, whichever model asks for it.

    diffusers' own `SlicedAttnProcessor` keeps all scores of a slice, so that it takes more memory than the fused
    kernels do, and only U-Nets have it. Here every slice goes to the kernel that the whole would have gone to.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            return sliced(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def sliced(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """`scaled_dot_product_attention` of (lanes, heads, tokens, width), equal to it within rounding: a query's result
    depends on no other query and no other head.

    What is not such attention (causal, with dropout, grouped) is computed whole.
    """
    whole = is_causal or dropout_p or options.get("enable_gqa") or query.dim() != 4 or key.shape[1] != query.shape[1]
    if whole or query.shape[:-1].numel() * key.shape[-2] <= SCORES:
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    for lane, heads, rows in _slices(query, key.shape[-2]):
        mask = None if attn_mask is None else _part(attn_mask, lane, heads, rows)
        one = slice(lane, lane + 1)
        out[one, heads, rows] = scaled_dot_product_attention(
            query[one, heads, rows], key[one, heads], value[one, heads], mask, **options
        )
    return out


def slice_attention(denoiser: nn.Module, wanted: bool) -> None:
    """From its next call on, the denoiser computes its attention in slices, or not."""
    vars(denoiser).pop("forward", None)
    if not wanted:
        return
    forward = denoiser.forward

    @wraps(forward)
    def slicing(*args: Any, **kwargs: Any) -> Any:
        with SlicedAttention():
            return forward(*args, **kwargs)

    denoiser.forward = slicing


def _slices(query: torch.Tensor, keys: int) -> Iterator[tuple[int, slice, slice]]:
    """Lane, heads and queries of each slice: as many heads as `SCORES` has room for, or part of one's queries."""
    lanes, heads, tokens = query.shape[:3]
    per_slice = max(1, SCORES // (tokens * keys))
    rows = tokens if tokens * keys <= SCORES else max(1, SCORES // keys)
    for lane in range(lanes):
        for head in range(0, heads, per_slice):
            for row in range(0, tokens, rows):
                yield lane, slice(head, head + per_slice), slice(row, row + rows)


def _part(mask: torch.Tensor, lane: int, heads: slice, rows: slice) -> torch.Tensor:
    """Of a mask that stands for all lanes, heads or queries where its dimension is 1 or missing."""
    mask = mask[(None,) * (4 - mask.dim())]
    every = slice(None)
    return mask[
        every if mask.shape[0] == 1 else slice(lane, lane + 1),
        every if mask.shape[1] == 1 else heads,
        every if mask.shape[2] == 1 else rows,
    ]
