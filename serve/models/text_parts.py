"""The text encoders of a model folder, checked from their configurations and safetensors headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.models.tensor_tables import Kind, Shape, clip_table, stored_names, t5_feed_forward, t5_table
from serve.models.text_tokenizers import check_clip_tokenizer, check_t5_tokenizer
from serve.models.weight_files import TensorInfo, read_headers, read_json, refused, weight_files

CLASSES: Mapping[str, Mapping[str, str]] = {
    "sd": {"text_encoder": "CLIPTextModel"},
    "sdxl": {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
    "sd3": {
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    },
    "sdxl_refiner": {"text_encoder_2": "CLIPTextModelWithProjection"},
    "flux": {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
    "pixart": {"text_encoder": "T5EncoderModel"},
    "auraflow": {"text_encoder": "UMT5EncoderModel"},
}
"""Family -> role -> class, as the constructors of diffusers' pipelines have them."""
DROPPABLE = frozenset({("sd3", "text_encoder_3")})
MASKED = frozenset({"sd"})
"""Families whose stock pipeline hides the padding from a CLIP whose configuration sets `use_attention_mask`."""
LONGEST_ROW: Mapping[str, int] = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Pipeline -> tokens of the longest T5 row that it was trained with, where pipelines of one family differ."""
ROW_TOKENS = 77
"""Tokens of one row of every CLIP text encoder."""
_MODEL_TYPES: Mapping[Kind, str] = {"clip": "clip_text_model", "t5": "t5", "umt5": "umt5"}
_T5_CLASSES: Mapping[str, Kind] = {"T5EncoderModel": "t5", "UMT5EncoderModel": "umt5"}
_ACTIVATIONS = frozenset({"quick_gelu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "swish"})
_STORED = frozenset({"F64", "F32", "F16", "BF16"})
_CLIP_NAMES = {(768, 12): "clip-l", (1024, 23): "openclip-h", (1024, 24): "openclip-h", (1280, 32): "openclip-bigg"}
_T5_NAMES = {512: "t5-small", 768: "t5-base", 1024: "t5-large", 2048: "t5-xl", 4096: "t5-xxl"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """One text encoder of a model folder, checked. `weights` and `tokenizer` are folders.

    `role` is the folder's name in the diffusers layout. `name` says the architecture, not the weights. `projection` is
    the width of the text projection, None without one. A row has `row_tokens` tokens, for T5 (None) any number, and at
    most `longest_row` where the pipeline knows more of it than the family.
    `setting` is the group of settings that names the model, for what is found wrong with the files later on.
    """

    role: str
    kind: Kind
    name: str
    weights: Path
    tokenizer: Path
    width: int
    layers: int
    vocab_size: int
    projection: int | None
    row_tokens: int | None
    longest_row: int | None = None
    setting: str = "model"


def text_parts(folder: Path, family: str, index: Mapping[str, Any]) -> tuple[TextPart, ...]:
    """Every text encoder of `folder`, in role order; `index` is its model_index.json. Raises OperatorError."""
    parts = []
    for role, cls in CLASSES[family].items():
        found = class_of(index, role)
        if found is None and (family, role) in DROPPABLE:
            continue
        if found != cls:
            raise refused(f"{folder}: its {role} is {found or 'missing'}; {cls} is what the {family} family has")
        if cls in _T5_CLASSES:
            parts.append(_t5_part(folder, role, _T5_CLASSES[cls], LONGEST_ROW.get(str(index.get("_class_name")))))
        else:
            parts.append(_clip_part(folder, role, cls, family))
    return tuple(parts)


def class_of(index: Mapping[str, Any], part: str) -> str | None:
    """The class that model_index.json, as [library, class], gives for a part."""
    entry = index.get(part)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None else None


def _clip_part(folder: Path, role: str, cls: str, family: str) -> TextPart:
    weights, tokenizer = folder / role, folder / role.replace("text_encoder", "tokenizer")
    config = _configuration(weights, "clip")
    width, layers, vocab_size = _sizes(weights, config, "hidden_size", "num_hidden_layers", "vocab_size")
    positions, heads, _ = _sizes(weights, config, "max_position_embeddings", "num_attention_heads", "intermediate_size")
    if positions != ROW_TOKENS:
        raise refused(f"{weights} reads {positions} tokens (max_position_embeddings), not {ROW_TOKENS}")
    if width % heads:
        raise refused(f"{weights}: num_attention_heads {heads} does not divide hidden_size {width}")
    _check_maths(weights, config, "hidden_act", "quick_gelu", "layer_norm_eps")
    if family in MASKED and config.get("use_attention_mask"):
        raise refused(f"{weights}: use_attention_mask is set, and padding is always read here")
    end = config.get("eos_token_id", 49407)
    if not isinstance(end, int) or not 0 <= end < vocab_size:
        raise refused(f"{weights}: its eos_token_id {end} is not one of its {vocab_size} tokens")
    check_clip_tokenizer(tokenizer, vocab_size, end)
    projection = _sizes(weights, config, "projection_dim")[0] if cls == "CLIPTextModelWithProjection" else None
    # A text projection that this family does not read is as harmless as it is in the stock pipeline.
    spare = {"text_projection.weight"} if projection is None else set()
    _check_tensors(weights, "clip", clip_table(config, projection), spare)
    return TextPart(
        role=role,
        kind="clip",
        name=_CLIP_NAMES.get((width, layers), f"clip-{width}x{layers}"),
        weights=weights,
        tokenizer=tokenizer,
        width=width,
        layers=layers,
        vocab_size=vocab_size,
        projection=projection,
        row_tokens=ROW_TOKENS,
    )


def _t5_part(folder: Path, role: str, kind: Kind, longest_row: int | None) -> TextPart:
    weights, tokenizer = folder / role, folder / role.replace("text_encoder", "tokenizer")
    config = _configuration(weights, kind)
    width, layers, vocab_size = _sizes(weights, config, "d_model", "num_layers", "vocab_size")
    _sizes(weights, config, "d_kv", "d_ff", "num_heads", "relative_attention_num_buckets")
    _check_maths(weights, config, "dense_act_fn", "relu", "layer_norm_epsilon")
    if t5_feed_forward(config)[0] not in _ACTIVATIONS:
        raise refused(f"{weights}: its feed_forward_proj is {config.get('feed_forward_proj')}")
    check_t5_tokenizer(tokenizer, vocab_size, kind)
    _check_tensors(weights, kind, t5_table(config, kind), set())
    return TextPart(
        role=role,
        kind=kind,
        name=kind.removesuffix("t5") + _T5_NAMES.get(width, f"t5-{width}x{layers}"),
        weights=weights,
        tokenizer=tokenizer,
        width=width,
        layers=layers,
        vocab_size=vocab_size,
        projection=None,
        row_tokens=None,
        longest_row=longest_row,
    )


def _configuration(part: Path, kind: Kind) -> Mapping[str, Any]:
    config = read_json(part / "config.json")
    if (found := config.get("model_type")) != _MODEL_TYPES[kind]:
        raise refused(f"{part}: its model_type is {found}, not {_MODEL_TYPES[kind]}")
    return config


def _sizes(part: Path, config: Mapping[str, Any], *fields: str) -> list[int]:
    for field in fields:
        value = config.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise refused(f"{part}: its configuration lacks or garbles {field} ({value})")
    return [config[field] for field in fields]


def _check_maths(part: Path, config: Mapping[str, Any], act: str, usual: str, eps: str) -> None:
    """An activation that transformers knows, and a norm's epsilon above 0; both have a default."""
    if (found := config.get(act, usual)) not in _ACTIVATIONS:
        raise refused(f"{part}: its {act} is {found}; {', '.join(sorted(_ACTIVATIONS))} are what is known")
    value = config.get(eps, 1e-5)
    if not isinstance(value, float) or not 0 < value < 1:
        raise refused(f"{part}: its configuration lacks or garbles {eps} ({value})")


def _check_tensors(part: Path, kind: Kind, expected: Mapping[str, Shape], spare: set[str]) -> None:
    """The files hold exactly the tensors that the configuration promises, in their shapes."""
    tensors = read_headers(weight_files(part))
    try:
        names = stored_names(tensors, kind)
    except ValueError as error:
        raise refused(f"{part} holds one tensor under two names: {error}") from None
    if missing := [name for name in expected if name not in names]:
        raise refused(f"{part}: its weights lack {_and_more(missing)}")
    for name, shape in expected.items():
        _check_tensor(part, names[name], tensors[names[name]], shape)
    if foreign := [names[name] for name in names if name not in expected and name not in spare]:
        raise refused(f"{part}: its configuration does not explain the tensor {_and_more(foreign)}")


def _check_tensor(part: Path, name: str, found: TensorInfo, shape: Shape) -> None:
    if found.shape != shape:
        raise refused(f"{part}: {name} has the shape {list(found.shape)}, its configuration says {list(shape)}")
    if found.dtype not in _STORED:
        raise refused(f"{part}: {name} is stored as {found.dtype}; {', '.join(sorted(_STORED))} are what is read")


def _and_more(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
