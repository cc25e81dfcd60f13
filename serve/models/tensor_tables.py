"""Which tensors a text encoder's configuration promises, by name and shape, in plain Python.

The tables are those of transformers' `CLIPTextModel`, `CLIPTextModelWithProjection`, `T5EncoderModel` and
`UMT5EncoderModel` (`modeling_clip.py`, `modeling_t5.py`, `modeling_umt5.py` in `models/`). Files spell the names
differently: `canonical` is the one spelling that checks and fingerprints use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

Kind = Literal["clip", "t5", "umt5"]
"""UMT5 is a T5 with a position bias in every layer."""
Shape = tuple[int, ...]

PROJECTION = "text_projection.weight"
_EMBEDDING = "shared.weight"
_TIED = "encoder.embed_tokens.weight"


def canonical(name: str, kind: Kind) -> str | None:
    """The one spelling of a stored tensor's name; None for a tensor that the encoder does not read.

    CLIP: the prefix `text_model.` is dropped (checkpoints have it, transformers 5 saves some without); `position_ids`
    is a constant that old versions saved. T5: the embedding is stored as `shared` or as the encoder's own, tied; a
    whole T5 (decoder, head) holds the encoder as it is, and `T5EncoderModel` too reads past the rest.
    """
    if kind == "clip":
        name = name.removeprefix("text_model.")
        return None if name == "embeddings.position_ids" else name
    if name == "lm_head.weight" or name.startswith("decoder."):
        return None
    return _EMBEDDING if name == _TIED else name


def stored_names(names: Iterable[str], kind: Kind) -> dict[str, str]:
    """Canonical name -> the name in the file, without what the encoder does not read.

    Where T5's embedding is stored twice, the encoder's own counts: transformers does not tie two that differ. Raises
    ValueError with both names where a CLIP tensor is there twice.
    """
    table: dict[str, str] = {}
    for name in sorted(names):
        key = canonical(name, kind)
        if key is None or (key == _EMBEDDING and key in table):
            continue
        if key in table:
            raise ValueError(f"{table[key]} and {name}")
        table[key] = name
    return table


def clip_table(config: Mapping[str, Any], projection: int | None) -> dict[str, Shape]:
    """Shapes by canonical name of a CLIP text model; `projection` is the width of its text projection, if any."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    table: dict[str, Shape] = {
        "embeddings.token_embedding.weight": (config["vocab_size"], width),
        "embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{index}"
        for part, out, into in (
            *((f"self_attn.{name}_proj", width, width) for name in ("q", "k", "v", "out")),
            ("mlp.fc1", inner, width),
            ("mlp.fc2", width, inner),
        ):
            table |= {f"{layer}.{part}.weight": (out, into), f"{layer}.{part}.bias": (out,)}
        for part in ("layer_norm1", "layer_norm2"):
            table |= {f"{layer}.{part}.weight": (width,), f"{layer}.{part}.bias": (width,)}
    table |= {"final_layer_norm.weight": (width,), "final_layer_norm.bias": (width,)}
    return table if projection is None else table | {PROJECTION: (projection, width)}


def t5_table(config: Mapping[str, Any], kind: Kind = "t5") -> dict[str, Shape]:
    """Shapes by canonical name of a T5 or UMT5 encoder. T5's blocks share the position bias of the first one."""
    width, inner, heads = config["d_model"], config["d_ff"], config["num_heads"]
    attention = heads * config["d_kv"]
    _, gated = t5_feed_forward(config)
    table: dict[str, Shape] = {_EMBEDDING: (config["vocab_size"], width)}
    for index in range(config["num_layers"]):
        attend, feed = (f"encoder.block.{index}.layer.{part}" for part in (0, 1))
        table |= {f"{attend}.SelfAttention.{name}.weight": (attention, width) for name in ("q", "k", "v")}
        table[f"{attend}.SelfAttention.o.weight"] = (width, attention)
        table |= {
            f"{feed}.DenseReluDense.{name}.weight": (inner, width) for name in (("wi_0", "wi_1") if gated else ("wi",))
        }
        table[f"{feed}.DenseReluDense.wo.weight"] = (width, inner)
        table |= {f"{attend}.layer_norm.weight": (width,), f"{feed}.layer_norm.weight": (width,)}
        if index == 0 or kind == "umt5":
            bias = f"{attend}.SelfAttention.relative_attention_bias.weight"
            table[bias] = (config["relative_attention_num_buckets"], heads)
    return table | {"encoder.final_layer_norm.weight": (width,)}


def t5_feed_forward(config: Mapping[str, Any]) -> tuple[str, bool]:
    """(activation, gated) as `T5Config` and `UMT5Config` read them: `feed_forward_proj` is `relu` or `gated-gelu`."""
    usual = "gated-gelu" if config.get("model_type") == "umt5" else "relu"
    written = str(config.get("feed_forward_proj", usual))
    first, _, last = written.rpartition("-")
    act = "gelu_new" if written == "gated-gelu" else last
    return str(config.get("dense_act_fn", act)), bool(config.get("is_gated_act", first == "gated"))
