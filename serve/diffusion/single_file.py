"""A single-file checkpoint in its authors' key layout -> a diffusers folder, by diffusers' own mapping.

Runs as `python -m serve.diffusion.single_file CHECKPOINT OUT [CONFIG]`; exit status 1 with the reason as the last line
of stderr.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open

from serve.diffusion.single_file_flux import flux_transformer
from serve.diffusion.single_file_text import text_encoder
from serve.errors import OperatorError
from serve.models.checkpoints import Checkpoint, recognised, says
from serve.models.defaults import GENERATION_CONFIG
from serve.models.denoiser_configs import KINDS
from serve.models.folder import family_of
from serve.models.image_parts import VAE
from serve.models.sources import configuration_files
from serve.models.text_parts import DROPPABLE, class_of
from serve.models.weight_files import read_header, read_json, weight_files

_UNREAD = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of stock pipelines that nothing here reads."""
_FLOATS8 = frozenset({"F8_E4M3", "F8_E5M2"})


def convert(file: Path, config: str | Path | None, out: Path) -> None:
    """Write the diffusers folder `out`, as safetensors; in half precision where the whole checkpoint is.

    `config` is a diffusers folder or a hub id whose configuration and tokenizers describe the checkpoint; None lets
    diffusers recognize the checkpoint and take them from the hub. Parts that the checkpoint lacks become links to those
    of `config`.
    """
    checkpoint = recognised(file)
    folder = _configuration(file, config)
    index = dict(read_json(folder / "model_index.json"))
    _, family = family_of(folder)
    if family != checkpoint.family:
        sys.exit(f"it is of the {checkpoint.family} family, and model.config ({folder}) is of the {family} family")
    links = _links(checkpoint, folder)
    dtype = _dtype(file)
    out.mkdir(parents=True)
    _denoiser(checkpoint, folder, dtype).save_pretrained(out / KINDS[family].part)
    if "vae" in checkpoint.parts:
        vae = getattr(diffusers, VAE).from_single_file(
            str(file), config=str(folder), subfolder="vae", torch_dtype=dtype
        )
        vae.save_pretrained(out / "vae")
    for role in sorted(checkpoint.parts):
        if role.startswith("text_encoder") and class_of(index, role):
            text_encoder(checkpoint, role, folder, dtype, out / role)
    for part, target in links.items():
        (out / part).symlink_to(target.resolve(), target_is_directory=True)
    absent = {part for part in checkpoint.lacking if part not in links}
    _copy_the_rest(folder, index, absent, out)


def _configuration(file: Path, config: str | Path | None) -> Path:
    if config is not None and Path(config).is_dir():
        return Path(config)
    if config is None:
        config = fetch_diffusers_config(load_single_file_checkpoint(str(file)))["pretrained_model_name_or_path"]
    return Path(snapshot_download(str(config), allow_patterns=list(configuration_files(()))))


def _links(checkpoint: Checkpoint, folder: Path) -> dict[str, Path]:
    """The folders of the parts that the checkpoint lacks."""
    links = {}
    for part in checkpoint.lacking:
        try:
            complete = all(file.is_file() for file in weight_files(folder / part))
        except OperatorError:
            complete = False
        if complete:
            links[part] = folder / part
        elif (checkpoint.family, part) not in DROPPABLE:
            sys.exit(f"it has no {says(checkpoint.family, part)}, and model.config ({folder}) has none either")
    return links


def _denoiser(checkpoint: Checkpoint, folder: Path, dtype: Any) -> Any:
    """Refused where the configuration leaves some of the checkpoint's weights over: it is another model's."""
    part, cls = KINDS[checkpoint.family].part, getattr(diffusers, KINDS[checkpoint.family].cls)
    if checkpoint.family == "flux":
        return flux_transformer(checkpoint.file, cls, cls.load_config(folder, subfolder=part), dtype)
    model = cls.from_single_file(str(checkpoint.file), config=str(folder), subfolder=part, torch_dtype=dtype)
    known = sum(tensor.numel() for tensor in model.state_dict().values())
    tensors = read_header(checkpoint.file)
    prefix = "model.diffusion_model."
    whole = any(name.startswith(prefix) for name in tensors)
    held = sum(math.prod(info.shape) for name, info in tensors.items() if not whole or name.startswith(prefix))
    if held > known:
        sys.exit(f"its {part} has {held} weights, and model.config ({folder}) describes one of {known}")
    return model


def _copy_the_rest(folder: Path, index: dict[str, Any], absent: set[str], out: Path) -> None:
    """Scheduler, tokenizers and model_index.json, in which what the folder does not hold is null."""
    for source in sorted(folder.iterdir()):
        if source.is_dir() and (source.name == "scheduler" or source.name.startswith("tokenizer")):
            shutil.copytree(source, out / source.name)
    if (folder / GENERATION_CONFIG).is_file():
        shutil.copy(folder / GENERATION_CONFIG, out)
    null = {*absent, *(part.replace("text_encoder", "tokenizer") for part in absent), *_UNREAD}
    index |= {part: [None, None] for part in null if part in index}
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _dtype(file: Path) -> Any:
    """The torch dtype of all weights if that is float16 or bfloat16, else None: each as it is, which rounds nothing.

    Weights in eight bits, which are those of half precision or float32 rounded, become what holds them all.
    """
    floats = {info.dtype: name for name, info in read_header(file).items() if not info.dtype.startswith(("I", "U"))}
    eights = floats.keys() & _FLOATS8
    wider = floats.keys() - eights
    if len(wider) == 1 and wider <= {"F16", "BF16"}:
        with safe_open(file, "pt") as weights:
            return weights.get_tensor(floats[next(iter(wider))]).dtype
    if not eights:
        return None
    return torch.float32 if wider else torch.bfloat16


def main() -> None:
    checkpoint, out, *config = sys.argv[1:]
    try:
        convert(Path(checkpoint), config[0] if config else None, Path(out))
    except (LocalEntryNotFoundError, HfHubHTTPError):
        sys.exit("its configuration could not be had from the hub; set model.config to a diffusers folder that fits it")
    except NotImplementedError:
        # accelerate left parameters without data: the checkpoint has none for them.
        sys.exit("it lacks weights that its configuration asks for")
    except OperatorError as error:
        sys.exit(error.message)
    except Exception as error:  # noqa: BLE001 -- whatever else diffusers raises becomes the reason that the operator reads
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split()).partition('. ')[0]}")


if __name__ == "__main__":
    main()
