"""What residual blocks and attention stacks have alive, counted in channels of one picture at one resolution.

Each figure is the most that a module of diffusers has alive beside its input, which its caller holds; Python keeps a
tensor until its name is given another or its function returns, so the figures follow from diffusers' source.

Convolutions and what they compute lie channels-last. A GPU's group normalisation reads and writes the other layout,
whatever it is given: it copies its input, and the convolution after it copies what it wrote. `copies` says that this is
so; on a CPU it is not.
"""

from __future__ import annotations

FEED_FORWARD = 4
"""Width of a feed-forward over that of its block, in every family but AuraFlow."""


def resnet(entering: int, leaving: int, copies: bool) -> int:
    """`ResnetBlock2D`: the first convolution with its input, the second normalisation, or the sum at the end, which
    diffusers divides by 1 into another tensor; with other channels leaving than entering, beside a shortcut."""
    first = entering * (1 + copies) + leaving
    total = (3 if entering == leaving else 4) * leaving
    return max(2 * entering, first, total, (2 + copies) * leaving)


def stack(channels: int) -> int:
    """`Transformer2DModel` of a U-Net, at the gated feed-forward of a block: the projection to twice the width, its
    gate through GELU, and their product; beside them the stack's and the block's state, the last attention's output
    and what was normalised. Its attention has less, however many tokens there are, where its kernel is fused."""
    return (4 + 4 * FEED_FORWARD) * channels


def upsampled(channels: int, copies: bool) -> int:
    """Twice the sides, in channels at the old resolution: enlarged, copied where what came was not channels-last, and
    convolved."""
    return 4 * (2 + copies) * channels
