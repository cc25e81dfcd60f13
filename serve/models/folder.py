"""`model.source` -> a checked diffusers folder. Everything downstream knows this one layout.

What can't be served is refused here, before anything starts, in one line that names the setting and the reason. No
weights are loaded: shapes come from the safetensors headers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve.errors import OperatorError
from serve.models.sources import converted, downloaded, hub_files
from serve.models.text_parts import CLASSES, TextPart, class_of, text_parts
from serve.models.weight_files import PICKLED, TensorInfo, naming, read_headers, read_json, refused, weight_files
from serve.settings import ModelSettings

SHIPPED = Path(__file__).parent.parent / "shapes" / "weights"
FAMILIES: Mapping[str, str] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}
DRAWN = "sd"
"""The family that this version draws; of the others it encodes the text."""
PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
SD3_CONTEXT = 4096
"""Width of the context of every published SD 3: that of T5-XXL."""
_REFINER = "StableDiffusionXLImg2ImgPipeline"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoiser:
    """The image side of a model. Sizes are pixels; latents are `vae_scale_factor` times smaller on each side.

    `size_multiple` is the grid of widths and heights. The U-Net takes any latent size (it hands its odd sizes up to
    the upsamplers), so that the grid is the VAE's, and at least diffusers' own 8.
    """

    default_width: int
    default_height: int
    size_multiple: int
    vae_scale_factor: int
    latent_channels: int
    prediction_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A model that can be served; `denoiser` is None where only its text is.

    `text` is in role order. `context_width` is the width of the context that the denoiser reads. `zero_empty_negative`
    is SDXL's `force_zeros_for_empty_prompt`: no negative prompt means zeros, not the embedding of the empty text.
    """

    name: str
    path: Path
    family: str
    text: tuple[TextPart, ...]
    context_width: int
    zero_empty_negative: bool
    denoiser: Denoiser | None


def resolve(settings: ModelSettings, data_dir: Path, *, text_only: bool = False, setting: str = "model") -> ModelFolder:
    """Find, fetch or convert the model, and check it. A converted checkpoint is kept under `data_dir`.

    `text_only` asks for the text encoders and tokenizers alone, and downloads no more. Raises OperatorError that names
    `source`, `revision` or `config` of the group `setting`: `model`, or `text_models.0`.
    """
    with naming(setting):
        folder, name = _find(settings, data_dir, text_only)
        model = check_folder(folder, settings.name or name, text_only=text_only)
    return replace(model, text=tuple(replace(part, setting=setting) for part in model.text))


def check_folder(folder: Path, name: str, *, text_only: bool = False) -> ModelFolder:
    """Raises OperatorError where `folder` is not a whole diffusers folder of a family that is served."""
    index, family = _model_index(folder, text_only)
    text = text_parts(folder, family, index)
    return ModelFolder(
        name=name,
        path=folder,
        family=family,
        text=text,
        context_width=_context_width(folder, family, text),
        zero_empty_negative=family == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True)),
        denoiser=None if text_only else _denoiser(folder, index, text[0].width),
    )


def _find(settings: ModelSettings, data_dir: Path, text_only: bool) -> tuple[Path, str]:
    """The folder, and the name of a model that is given none."""
    source = settings.source
    path = Path(source).expanduser()
    name = path.stem if path.suffix == ".safetensors" else path.name
    if source == "shapes":
        return SHIPPED, name
    if path.is_dir():
        return path.resolve(), name
    if path.is_file():
        return _from_file(path.resolve(), settings.config, data_dir), name
    if path.suffix in (".safetensors", *PICKLED) or not _HUB_ID.fullmatch(source):
        raise refused(f"{source} does not exist")
    commit = _commit(settings)
    # The index first: a model that can't be served is refused before gigabytes of it are fetched.
    _, family = _model_index(downloaded(source, commit, ["model_index.json"]), text_only)
    return downloaded(source, commit, hub_files(CLASSES[family], text_only)), name


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


def _model_index(folder: Path, text_only: bool) -> tuple[Mapping[str, Any], str]:
    """model_index.json, and the family that it says."""
    if not (folder / "model_index.json").is_file():
        raise refused(f"{folder} holds no model_index.json, so it is not a diffusers folder")
    index = read_json(folder / "model_index.json")
    cls = str(index.get("_class_name"))
    if cls == _REFINER:
        raise refused(f"{folder} is a {cls}: SDXL's refiner, which has half of SDXL's text encoders and is not served")
    if cls not in FAMILIES:
        raise refused(f"{folder} is a {cls}; this version serves {', '.join(FAMILIES)}")
    family = FAMILIES[cls]
    if not text_only and family != DRAWN:
        raise refused(
            f"{folder} is a {cls}; of the {family} family this version serves the text alone "
            "(text_models, or diffusion.replicas 0)"
        )
    return index, family


def _context_width(folder: Path, family: str, text: tuple[TextPart, ...]) -> int:
    """SD and SDXL lay their encoders side by side, FLUX reads T5; SD 3 pads its CLIPs to T5's width, T5 or not."""
    if family == "flux":
        return text[-1].width
    clips = sum(part.width for part in text if part.kind == "clip")
    if family != "sd3":
        return clips
    config = folder / "transformer" / "config.json"
    promised = read_json(config).get("joint_attention_dim") if config.is_file() else None
    t5 = next((part.width for part in text if part.kind == "t5"), None)
    width = promised or t5 or SD3_CONTEXT
    if not isinstance(width, int) or t5 not in (None, width) or clips > width:
        raise refused(f"{folder}: its transformer reads text {width} wide; its T5 is {t5}, its CLIPs {clips} together")
    return width


def _denoiser(folder: Path, index: Mapping[str, Any], context_width: int) -> Denoiser:
    for part, cls in PARTS.items():
        found = class_of(index, part)
        if found != cls:
            raise refused(f"{folder}: its {part} is {found or 'missing'}; {cls} is what the {DRAWN} family has")
    unet, vae = (read_json(folder / part / "config.json") for part in PARTS)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    try:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        channels = int(vae["latent_channels"])
        _check_image_weights(folder, unet, channels, context_width)
        height, width = _sides(unet.get("sample_size") or 64)
    except (KeyError, TypeError, ValueError) as error:
        raise refused(f"{folder}: a configuration lacks or garbles {error}") from None
    return Denoiser(
        default_width=width * factor,
        default_height=height * factor,
        size_multiple=math.lcm(factor, 8),
        vae_scale_factor=factor,
        latent_channels=channels,
        prediction_type=str(scheduler.get("prediction_type", "epsilon")),
    )


def _check_image_weights(folder: Path, unet: Mapping[str, Any], channels: int, context_width: int) -> None:
    """One telling tensor of each part has the shape that the configurations promise, and the parts fit together."""
    if unet["in_channels"] != channels:
        raise refused(f"{folder}: its U-Net reads {unet['in_channels']} channels, the VAE has {channels} (inpainting?)")
    if unet["cross_attention_dim"] != context_width:
        raise refused(f"{folder}: its U-Net reads text {unet['cross_attention_dim']} wide, not {context_width}")
    tensors = {part: read_headers(weight_files(folder / part)) for part in PARTS}
    first = unet["block_out_channels"][0]
    _expect(folder / "unet", tensors["unet"], "conv_in.weight", (first, channels, 3, 3))
    _expect(folder / "vae", tensors["vae"], "decoder.conv_in.weight", (None, channels, 3, 3))


def _expect(part: Path, tensors: Mapping[str, TensorInfo], name: str, shape: tuple[int | None, ...]) -> None:
    found = next((info.shape for key, info in tensors.items() if key == name or key.endswith(f".{name}")), None)
    if found is None:
        raise refused(f"{part}: the weights are of something else, they have no {name}")
    if len(found) != len(shape) or any(want not in (None, have) for have, want in zip(found, shape, strict=True)):
        raise refused(f"{part}: {name} has the shape {list(found)}, its configuration says otherwise")


def _sides(sample_size: Any) -> tuple[int, int]:
    if isinstance(sample_size, int):
        return sample_size, sample_size
    height, width = sample_size
    return int(height), int(width)
