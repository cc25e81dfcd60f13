"""Where a model comes from when it is not a diffusers folder yet: a single-file checkpoint, or the hub."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from serve.errors import OperatorError
from serve.models.weight_files import TOKENIZER_FILES, TensorInfo, read_header, refused

_UNFINISHED = ".converting-"
_FAMILIES = {
    "conditioner.embedders.1.": "SDXL",
    "conditioner.embedders.0.": "the SDXL refiner",
    "model.diffusion_model.joint_blocks.": "SD 3",
    "joint_blocks.": "SD 3",
    "model.diffusion_model.double_blocks.": "FLUX",
    "double_blocks.": "FLUX",
    "lora_": "a LoRA",
    "control_model.": "a ControlNet",
}
_SHARD = "[0-9]" * 5
"""Shards are numbered like this; with `*` the files of the fp16 variant would come too."""


def _weights(part: str, stem: str) -> tuple[str, ...]:
    return (
        f"{part}/config.json",
        f"{part}/{stem}.safetensors",
        f"{part}/{stem}.safetensors.index.json",
        f"{part}/{stem}-{_SHARD}-of-{_SHARD}.safetensors",
    )


_IMAGE_FILES = (
    "scheduler/scheduler_config.json",
    *_weights("unet", "diffusion_pytorch_model"),
    *_weights("vae", "diffusion_pytorch_model"),
)


def hub_files(roles: Iterable[str], text_only: bool) -> tuple[str, ...]:
    """Patterns of what `check_folder` asks for and nothing else: no pickles, no variants, no safety checker."""
    tokenizers = [role.replace("text_encoder", "tokenizer") for role in roles]
    return (
        "model_index.json",
        "transformer/config.json",
        *(f"{tokenizer}/{name}" for tokenizer in tokenizers for name in TOKENIZER_FILES),
        *(pattern for role in roles for pattern in _weights(role, "model")),
        *(() if text_only else _IMAGE_FILES),
    )


def converted(checkpoint: Path, config: str | None, data_dir: Path, check: Callable[[Path], object]) -> Path:
    """The diffusers folder made from `checkpoint`, made once and put in place by one rename.

    The conversion runs in a process of its own, so that torch and the checkpoint leave memory with it. Raises
    OperatorError; `check` raises it too, and then nothing is kept.
    """
    tensors = read_header(checkpoint)
    _check_checkpoint(checkpoint, tensors)
    models = data_dir.resolve() / "models"
    target = models / conversion_digest(checkpoint, config)
    if target.is_dir():
        return target
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _alone(models):
            if not target.is_dir():
                with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=models, ignore_cleanup_errors=True) as work:
                    _convert(checkpoint, config, Path(work) / "model")
                    check(Path(work) / "model")
                    (Path(work) / "model").rename(target)
    except OSError as error:
        raise OperatorError(f"data_dir: {models} can't be written: {error.strerror}", "data_dir") from None
    return target


def downloaded(hub_id: str, commit: str, files: Iterable[str]) -> Path:
    """The hub's snapshot of exactly that commit, from the local hub cache where it is there, with what is there of
    `files` (patterns). Raises OperatorError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(hub_id, revision=commit, allow_patterns=list(files)))
    except RevisionNotFoundError:
        raise OperatorError(f"model.revision: {hub_id} has no commit {commit} on the hub", "model.revision") from None
    except RepositoryNotFoundError:
        raise refused(f"the hub has no {hub_id}, or HF_TOKEN may not read it") from None
    except LocalEntryNotFoundError:
        raise refused(f"the hub does not answer, and {hub_id} at {commit} is not in the local hub cache") from None
    except (HfHubHTTPError, OSError):
        raise refused(f"{hub_id} at {commit} could not be fetched from the hub") from None


@contextmanager
def _alone(models: Path) -> Iterator[None]:
    """The replicas of one machine start together; one converts, the others wait. What a killed one left is removed."""
    with (models / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in models.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _check_checkpoint(file: Path, tensors: dict[str, TensorInfo]) -> None:
    for prefix, family in _FAMILIES.items():
        if any(name.startswith(prefix) for name in tensors):
            raise refused(f"{file} is of another family ({family}); this version serves checkpoints of the sd family")
    for prefix, part in (
        ("model.diffusion_model.input_blocks.", "U-Net"),
        ("first_stage_model.", "VAE"),
        ("cond_stage_model.", "text encoder"),
    ):
        if not any(name.startswith(prefix) for name in tensors):
            raise refused(f"{file} is not a whole Stable Diffusion checkpoint: it has no {part} ({prefix}*)")


def conversion_digest(checkpoint: Path, config: str | None) -> str:
    """Names the conversion. Reading gigabytes on every start would cost seconds, so that length, time of change and
    the first bytes (which hold the header) stand for the weights; the configuration's files are read whole."""
    stat = checkpoint.stat()
    digest = hashlib.blake2b(f"1\0{stat.st_size}\0{stat.st_mtime_ns}\0{config}\0".encode(), digest_size=16)
    with checkpoint.open("rb") as file:
        digest.update(file.read(1 << 20))
    folder = Path(config).expanduser() if config else None
    if folder and folder.is_dir():
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".txt") and path.is_file()):
            digest.update(
                f"\0{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes()
            )
    return digest.hexdigest()


def _convert(checkpoint: Path, config: str | None, out: Path) -> None:
    command = [sys.executable, "-m", "serve.diffusion.single_file", str(checkpoint), str(out)]
    if config is not None:
        folder = Path(config).expanduser()
        command.append(str(folder.resolve()) if folder.is_dir() else config)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines and done.returncode > 0 else f"the conversion ended with status {done.returncode}"
        raise refused(f"{checkpoint} can't be converted: {reason}")
