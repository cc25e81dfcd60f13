"""`model.source` -> a checked diffusers folder. Everything downstream knows this one layout.

What can't be served is refused here, before anything starts, in one line that names the setting and the reason. No
weights are loaded: shapes come from the safetensors headers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve.errors import OperatorError
from serve.models.checkpoints import recognised, says
from serve.models.conversion import converted
from serve.models.denoiser import Denoiser
from serve.models.image_parts import image_parts
from serve.models.sources import configuration_files, downloaded, hub_files
from serve.models.text_parts import CLASSES, DROPPABLE, TextPart, class_of, text_parts
from serve.models.weight_files import PICKLED, naming, read_json, refused
from serve.settings.pools import ModelSettings

SHIPPED = Path(__file__).parent.parent / "shapes" / "weights"
FAMILIES: Mapping[str, str] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionInpaintPipeline": "sd",
    "LatentConsistencyModelPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "AuraFlowPipeline": "auraflow",
}
"""By the pipeline that model_index.json names. SDXL's refiner has the first of SDXL's text encoders set to null."""
SD3_CONTEXT = 4096
"""Width of the context of every published SD 3: that of T5-XXL."""
_READ_T5 = frozenset({"flux", "pixart", "auraflow"})
_ZEROES = ("sdxl", "sdxl_refiner")
"""Families whose stock pipelines read zeros for no negative prompt, unless model_index.json says otherwise."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SHOWN = 80
"""Characters of a path that is none."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


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

    @property
    def created(self) -> int:
        """When this copy of it was made, in Unix seconds."""
        return int((self.path / "model_index.json").stat().st_mtime)


def resolve(
    settings: ModelSettings,
    data_dir: Path,
    *,
    text_only: bool = False,
    setting: str = "model",
    here_only: bool = False,
) -> ModelFolder:
    """Find, fetch or convert the model, and check it. A converted checkpoint is kept under `data_dir`.

    `text_only` asks for the text encoders and tokenizers alone, and downloads no more. Raises OperatorError that names
    `source`, `revision` or `config` of the group `setting`: `model`, or `text_models.0`. With `here_only` nothing is
    fetched or converted: that is NotHereYet.
    """
    with naming(setting):
        folder, name = _find(settings, data_dir, text_only, here_only)
        model = check_folder(folder, name, text_only=text_only)
    return replace(
        model,
        name=settings.name or name,
        text=tuple(replace(part, setting=setting) for part in model.text),
        denoiser=None if model.denoiser is None else _as_set(model.denoiser, settings),
    )


def check_folder(folder: Path, name: str, *, text_only: bool = False) -> ModelFolder:
    """`name` is the source's own. Raises OperatorError where `folder` is not a whole diffusers folder of a family that
    is served."""
    index, family = family_of(folder)
    text = text_parts(folder, family, index)
    context_width = _context_width(folder, family, text)
    return ModelFolder(
        name=name,
        path=folder,
        family=family,
        text=text,
        context_width=context_width,
        zero_empty_negative=family in _ZEROES and bool(index.get("force_zeros_for_empty_prompt", True)),
        denoiser=None if text_only else image_parts(folder, name, family, index, text, context_width),
    )


def _as_set(denoiser: Denoiser, settings: ModelSettings) -> Denoiser:
    """The operator's defaults go over the model's."""
    steps, scale = settings.num_inference_steps, settings.guidance_scale
    return replace(
        denoiser,
        default_num_inference_steps=denoiser.default_num_inference_steps if steps is None else steps,
        default_guidance_scale=denoiser.default_guidance_scale if scale is None else scale,
    )


def local_path(source: str, setting: str = "model.source") -> Path:
    """Where that would lie on this machine. Raises OperatorError naming `setting` where it can't even be looked for: in
    the home of a user who is not here, under a name that is too long, in a folder that may not be read."""
    try:
        path = Path(source).expanduser()
        path.exists()
    except RuntimeError:
        reason = "there is no such user"
    except OSError as error:
        reason = str(error.strerror)
    else:
        return path
    shown = source if len(source) <= _SHOWN else f"{source[:_SHOWN]}..."
    raise OperatorError(f"{setting}: {' '.join(shown.splitlines())}: {reason}", setting)


def _find(settings: ModelSettings, data_dir: Path, text_only: bool, here_only: bool) -> tuple[Path, str]:
    """The folder, and the name of a model that is given none."""
    source = settings.source
    path = local_path(source)
    name = path.stem if path.suffix == ".safetensors" else path.name
    if source == "shapes":
        return SHIPPED, name
    if path.is_dir():
        return path.resolve(), name
    if path.is_file():
        return _from_file(path.resolve(), settings, data_dir, here_only), name
    if path.suffix in (".safetensors", *PICKLED) or not _HUB_ID.fullmatch(source):
        raise refused(f"{source} does not exist")
    commit = _commit(source, settings.revision)
    # The index first: a model that can't be served is refused before gigabytes of it are fetched.
    _, family = family_of(downloaded(source, commit, ["model_index.json"], here_only=here_only))
    return downloaded(source, commit, hub_files(CLASSES[family], text_only), here_only=here_only), name


def _from_file(file: Path, settings: ModelSettings, data_dir: Path, here_only: bool) -> Path:
    """The folder that a checkpoint was converted to. What it lacks has to be in `settings.config`."""
    if file.suffix in PICKLED:
        raise refused(f"{file} is pickled, and loading it would run its code; save it as safetensors")
    config = settings.config
    folder = None if config is None else local_path(config, "model.config")
    if folder is not None and not folder.is_dir() and not _HUB_ID.fullmatch(str(config)):
        raise OperatorError(f"model.config: {config} is neither a folder nor a hub id", "model.config")
    checkpoint = recognised(file)
    lacking = [part for part in checkpoint.lacking if (checkpoint.family, part) not in DROPPABLE]
    if lacking and config is None:
        raise refused(
            f"{file} has no {says(checkpoint.family, lacking[0])}; set model.config to a diffusers folder that has"
        )
    if config is not None and folder is not None and not folder.is_dir() and (lacking or settings.revision):
        commit = _commit(config, settings.revision)
        patterns = configuration_files(checkpoint.lacking)
        config = str(downloaded(config, commit, patterns, here_only=here_only))
    return converted(file, config, data_dir, lambda folder: check_folder(folder, file.stem), here_only=here_only)


def _commit(hub_id: str, revision: str | None) -> str:
    if revision is None or not _COMMIT.fullmatch(revision):
        raise OperatorError(
            f"model.revision: {hub_id} is no folder here, and as a hub id it needs a full commit hash "
            "(40 hex digits), so that every replica loads the same weights",
            "model.revision",
        )
    return revision


def family_of(folder: Path) -> tuple[Mapping[str, Any], str]:
    """model_index.json, and the family that it says. Raises OperatorError."""
    if not (folder / "model_index.json").is_file():
        raise refused(f"{folder} holds no model_index.json, so it is not a diffusers folder")
    index = read_json(folder / "model_index.json")
    cls = str(index.get("_class_name"))
    if cls not in FAMILIES:
        raise refused(f"{folder} is a {cls}; this version serves {', '.join(FAMILIES)}")
    family = FAMILIES[cls]
    if family == "sdxl" and class_of(index, "text_encoder") is None and class_of(index, "text_encoder_2"):
        family = "sdxl_refiner"
    return index, family


def _context_width(folder: Path, family: str, text: tuple[TextPart, ...]) -> int:
    """SD and SDXL lay their CLIPs side by side; SD 3 pads its CLIPs to T5's width, T5 or not; the others read T5."""
    if family in _READ_T5:
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
