"""Lanes -> the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from serve.diffusion.families.base import Lane


def latents_of(lanes: Sequence[Lane]) -> torch.Tensor:
    """(lanes, channels, height, width)."""
    return torch.cat([lane.latents for lane in lanes])


def timesteps_of(lanes: Sequence[Lane], device: torch.device) -> torch.Tensor:
    """(lanes,), float32: what each sampler lists is of a dtype of its own, and would not stack."""
    return torch.stack([lane.timestep.float() for lane in lanes]).to(device)


def contexts_of(lanes: Sequence[Lane]) -> torch.Tensor:
    """(lanes, tokens, width). Lengths must be equal."""
    return torch.stack([lane.text.context for lane in lanes])


def pooled_of(lanes: Sequence[Lane]) -> torch.Tensor:
    """(lanes, width)."""
    vectors = [lane.text.pooled for lane in lanes if lane.text.pooled is not None]
    assert len(vectors) == len(lanes), "this family's conditioning has pooled text"
    return torch.stack(vectors)


def padded(contexts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(tokens, width) each -> (lanes, longest, width), and a mask (lanes, longest), 1 where there is a token.

    Contexts of one length have no mask: attention without one is faster, and to the bit what the stock pipeline
    computes.
    """
    lengths = [len(context) for context in contexts]
    longest = max(lengths)
    if min(lengths) == longest:
        return torch.stack(list(contexts)), None
    mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    return torch.nn.utils.rnn.pad_sequence(list(contexts), batch_first=True), mask.to(contexts[0])
