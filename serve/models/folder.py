"""`model.source` -> a checked diffusers folder. Everything downstream knows this one layout.

What can't be served is refused here, before anything starts, in one line that names the setting and the reason. No
weights are loaded: shapes come from the safetensors headers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import OperatorError
from serve.models.sources import converted, downloaded
from serve.models.weight_files import PICKLED, TensorInfo, read_headers, read_json, refused, weight_files
from serve.settings import ModelSettings

SHIPPED = Path(__file__).parent.parent / "shapes" / "weights"
PIPELINE = "StableDiffusionPipeline"
PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
ROW_TOKENS = 77
"""Tokens of one row of every CLIP text encoder."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A model that can be served. Sizes are pixels; latents are `vae_scale_factor` times smaller on each side.

    `size_multiple` is the grid of widths and heights. The U-Net takes any latent size (it hands its odd sizes up to
    the upsamplers), so that the grid is the VAE's, and at least diffusers' own 8.
    """

    name: str
    path: Path
    family: str
    default_width: int
    default_height: int
    size_multiple: int
    vae_scale_factor: int
    latent_channels: int
    prediction_type: str


def resolve(settings: ModelSettings, data_dir: Path) -> ModelFolder:
    """Find, fetch or convert the model, and check it. A converted checkpoint is kept under `data_dir`.

    Raises OperatorError that names `model.source`, `model.revision` or `model.config`.
    """
    source = settings.source
    path = Path(source).expanduser()
    if source == "shapes":
        folder = SHIPPED
    elif path.is_dir():
        folder = path.resolve()
    elif path.is_file():
        folder = _from_file(path.resolve(), settings.config, data_dir)
    elif path.suffix in (".safetensors", *PICKLED) or not _HUB_ID.fullmatch(source):
        raise refused(f"{source} does not exist")
    else:
        folder = downloaded(source, _commit(settings))
    name = settings.name or (path.stem if path.suffix == ".safetensors" else path.name)
    return check_folder(folder, name)


def check_folder(folder: Path, name: str) -> ModelFolder:
    """Raises OperatorError where `folder` is not a whole diffusers folder of the sd family."""
    index = _model_index(folder)
    for part, cls in PARTS.items():
        found = index.get(part) or [None, None]
        if found[1] != cls:
            raise refused(f"{folder}: its {part} is {found[1] or 'missing'}; {cls} is what the sd family has")
    unet, vae, text = (read_json(folder / part / "config.json") for part in PARTS)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    _check_tokenizer(folder / "tokenizer", text)
    try:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        channels = int(vae["latent_channels"])
        _check_weights(folder, unet, text, channels)
        height, width = _sides(unet.get("sample_size") or 64)
    except (KeyError, TypeError, ValueError) as error:
        raise refused(f"{folder}: a configuration lacks or garbles {error}") from None
    return ModelFolder(
        name=name,
        path=folder,
        family="sd",
        default_width=width * factor,
        default_height=height * factor,
        size_multiple=math.lcm(factor, 8),
        vae_scale_factor=factor,
        latent_channels=channels,
        prediction_type=str(scheduler.get("prediction_type", "epsilon")),
    )


def _from_file(file: Path, config: str | None, data_dir: Path) -> Path:
    if file.suffix in PICKLED:
        raise refused(f"{file} is pickled, and loading it would run its code; save it as safetensors")
    if config is not None and not Path(config).expanduser().is_dir() and not _HUB_ID.fullmatch(config):
        raise OperatorError(f"model.config: {config} is neither a folder nor a hub id", "model.config")
    return converted(file, config, data_dir, lambda folder: check_folder(folder, file.stem))


def _commit(settings: ModelSettings) -> str:
    if settings.revision is None or not _COMMIT.fullmatch(settings.revision):
        raise OperatorError(
            f"model.revision: {settings.source} is no folder here, and as a hub id it needs a full commit hash "
            "(40 hex digits), so that every replica loads the same weights",
            "model.revision",
        )
    return settings.revision


def _model_index(folder: Path) -> Mapping[str, Any]:
    if not (folder / "model_index.json").is_file():
        raise refused(f"{folder} holds no model_index.json, so it is not a diffusers folder")
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != PIPELINE:
        raise refused(f"{folder} is a {index.get('_class_name')}; this version serves {PIPELINE} (the sd family)")
    return index


def _check_weights(folder: Path, unet: Mapping[str, Any], text: Mapping[str, Any], channels: int) -> None:
    """One telling tensor of each part has the shape that the configurations promise, and the parts fit together."""
    if unet["in_channels"] != channels:
        raise refused(f"{folder}: its U-Net reads {unet['in_channels']} channels, the VAE has {channels} (inpainting?)")
    if unet["cross_attention_dim"] != text["hidden_size"]:
        raise refused(f"{folder}: its U-Net reads text {unet['cross_attention_dim']} wide, not {text['hidden_size']}")
    tensors = {part: read_headers(weight_files(folder / part)) for part in PARTS}
    first = unet["block_out_channels"][0]
    _expect(folder / "unet", tensors["unet"], "conv_in.weight", (first, channels, 3, 3))
    _expect(folder / "vae", tensors["vae"], "decoder.conv_in.weight", (None, channels, 3, 3))
    shape = (text["vocab_size"], text["hidden_size"])
    _expect(folder / "text_encoder", tensors["text_encoder"], "embeddings.token_embedding.weight", shape)


def _expect(part: Path, tensors: Mapping[str, TensorInfo], name: str, shape: tuple[int | None, ...]) -> None:
    found = next((info.shape for key, info in tensors.items() if key == name or key.endswith(f".{name}")), None)
    if found is None:
        raise refused(f"{part}: the weights are of something else, they have no {name}")
    if len(found) != len(shape) or any(want not in (None, have) for have, want in zip(found, shape, strict=True)):
        raise refused(f"{part}: {name} has the shape {list(found)}, its configuration says otherwise")


def _check_tokenizer(folder: Path, text: Mapping[str, Any]) -> None:
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        ids = list(read_json(folder / "vocab.json").values())
    elif (folder / "tokenizer.json").is_file():
        ids = list(read_json(folder / "tokenizer.json").get("model", {}).get("vocab", {}).values())
    else:
        raise refused(f"{folder} holds neither tokenizer.json nor vocab.json and merges.txt")
    for added in (
        read_json(folder / "tokenizer.json").get("added_tokens", ()) if (folder / "tokenizer.json").is_file() else ()
    ):
        ids.append(added["id"])
    size = max(ids, default=-1) + 1
    if size != text.get("vocab_size"):
        raise refused(f"{folder} knows {size} tokens, the text encoder {text.get('vocab_size')}")
    if text.get("max_position_embeddings") != ROW_TOKENS:
        raise refused(
            f"{folder.parent}: its text encoder reads {text.get('max_position_embeddings')} tokens, not {ROW_TOKENS}"
        )


def _sides(sample_size: Any) -> tuple[int, int]:
    if isinstance(sample_size, int):
        return sample_size, sample_size
    height, width = sample_size
    return int(height), int(width)
