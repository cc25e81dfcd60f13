"""The text encoders that are measured: their sizes, and the arithmetic of one row through them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from serve.models.text_parts import ROW_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderShape:
    """One architecture. `head_width` times `heads` is the width inside the attention; `row_tokens` the length of the
    rows that are measured; `projection` the width of the text projection, None without one.
    """

    name: str
    kind: Literal["clip", "t5"]
    width: int
    layers: int
    heads: int
    head_width: int
    feed_forward: int
    vocab_size: int
    row_tokens: int = ROW_TOKENS
    activation: str = "gelu"
    projection: int | None = None

    @property
    def flop_per_row(self) -> int:
        """Floating-point operations of one row's matrix products, a multiplication and an addition counted as two.

        Per layer: four projections of the attention, scores and weighted sum, and the feed-forward's two matrices
        (three where it is gated: T5 v1.1). Norms, softmax and activations are left out, as usual: they are less than a
        hundredth.
        """
        inner = self.heads * self.head_width
        matrices = 3 if self.kind == "t5" else 2
        per_token = 4 * self.width * inner + 2 * self.row_tokens * inner + matrices * self.width * self.feed_forward
        return 2 * (self.layers * self.row_tokens * per_token + (self.projection or 0) * self.width)

    @property
    def special_ids(self) -> tuple[tuple[int, ...], int, int]:
        """What begins a text, ends it, and pads the row. CLIP's are the last two of its vocabulary."""
        if self.kind == "t5":
            return (), 1, 0
        return (self.vocab_size - 2,), self.vocab_size - 1, self.vocab_size - 1

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of transformers' CLIPTextConfig or T5Config."""
        if self.kind == "t5":
            return {
                "d_model": self.width,
                "num_layers": self.layers,
                "num_heads": self.heads,
                "d_kv": self.head_width,
                "d_ff": self.feed_forward,
                "vocab_size": self.vocab_size,
                "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False,
            }
        (begin,), end, pad = self.special_ids
        return {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.feed_forward,
            "hidden_act": self.activation,
            "projection_dim": self.projection or self.width,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.row_tokens,
            "bos_token_id": begin,
            "eos_token_id": end,
            "pad_token_id": pad,
        }


def _clip(name: str, width: int, layers: int, heads: int, **more: Any) -> EncoderShape:
    return EncoderShape(
        name=name,
        kind="clip",
        width=width,
        layers=layers,
        heads=heads,
        head_width=width // heads,
        feed_forward=4 * width,
        vocab_size=49408,
        **more,
    )


def _t5(name: str, width: int, layers: int, heads: int, feed_forward: int) -> EncoderShape:
    return EncoderShape(
        name=name,
        kind="t5",
        width=width,
        layers=layers,
        heads=heads,
        head_width=64,
        feed_forward=feed_forward,
        vocab_size=32128,
        row_tokens=256,
    )


SHAPES: Mapping[str, EncoderShape] = {
    shape.name: shape
    for shape in (
        _clip("clip-l", 768, 12, 12, activation="quick_gelu"),
        _clip("openclip-h", 1024, 24, 16),
        _clip("openclip-bigg", 1280, 32, 20, projection=1280),
        _t5("t5-small", 512, 8, 6, 1024),
        _t5("t5-base", 768, 12, 12, 2048),
    )
}
"""CLIP-L as in Stable Diffusion 1.x, OpenCLIP's H/14 (2.x stops one layer earlier) and bigG/14 (SDXL), T5 v1.1."""

T5_XXL = _t5("t5-xxl", 4096, 24, 64, 10240)
"""v1.1, of SD 3 and FLUX. Not among those that `tandem bench encode` takes, which writes them to disk in float32."""


def model_of(shape: EncoderShape) -> tuple[EncoderShape, ...]:
    """The text encoders of the model in which a server is given this one, in role order: a CLIP without projection
    alone, as in Stable Diffusion 1.x, a T5 after CLIP-L, as in FLUX. Of others no such model is made: nothing."""
    if shape.kind == "t5":
        return (SHAPES["clip-l"], shape)
    return (shape,) if shape.projection is None else ()
