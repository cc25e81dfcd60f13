"""What a model takes of a card, phase by phase."""

from __future__ import annotations

from serve.memory.activations import decode_bytes, encode_bytes, step_bytes
from serve.memory.terms import BYTES, Dtype, Footprint, ModelShape
from serve.memory.weights import weight_bytes
from serve.rungs import MEANS, Rung


def footprint(
    shape: ModelShape, dtype: Dtype, rung: Rung, width: int, height: int, lanes: int, tile: int | None = None
) -> Footprint:
    """For steps of `lanes` lanes of one size in pixels, and one image in the VAE; `tile=None` takes the rung's.

    Nothing on the CPU's rung is on the card.
    """
    means = MEANS[rung]
    if not means.on_card:
        return Footprint(weights=0, step=0, decode=0, encode=0, beside=True)
    side = means.tile if tile is None else tile
    step = step_bytes(shape, dtype, width, height, lanes)
    if means.weights != "plain":
        step += shape.largest_layer * BYTES[dtype]  # unpacked for its product
    return Footprint(
        weights=weight_bytes(shape, dtype, rung),
        step=step,
        decode=decode_bytes(shape, dtype, width, height, side),
        encode=encode_bytes(shape, dtype, width, height, side),
        beside=means.decode == "beside",
    )
