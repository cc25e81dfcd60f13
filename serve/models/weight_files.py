"""Which safetensors files a model part consists of, and what their headers promise. No tensor is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import OperatorError

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
STEMS = ("model", "diffusion_pytorch_model")
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
MAX_HEADER_BYTES = 100_000_000
"""As in the safetensors library."""


class NotHereYet(OperatorError):
    """The model would be fetched or converted first, and that was not asked for."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: str
    shape: tuple[int, ...]


def refused(reason: str) -> OperatorError:
    """The one line that an operator reads, whatever a file has put into it; every refusal of a model goes through
    here."""
    return OperatorError(f"model.source: {' '.join(reason.splitlines())}", "model.source")


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """What is refused in here as `model.*` is refused as `setting.*`: `setting` is the group that names the model,
    `model` or `text_models.0`."""
    try:
        yield
    except OperatorError as error:
        if setting == "model" or error.param is None or not error.param.startswith("model."):
            raise
        raise type(error)(
            f"{setting}{error.message.removeprefix('model')}", f"{setting}{error.param.removeprefix('model')}"
        ) from error


def weight_files(part: Path) -> list[Path]:
    """The files that transformers and diffusers would load from the folder of one part: one file, or an index's shards.

    Raises OperatorError where there are none that are safe to load.
    """
    for stem in STEMS:
        if (single := part / f"{stem}.safetensors").is_file():
            return [single]
        if (index := part / f"{stem}.safetensors.index.json").is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise refused(f"{index} lists no files")
            return [part / name for name in sorted({Path(str(file)).name for file in weight_map.values()})]
    present = sorted(path.name for path in part.iterdir()) if part.is_dir() else []
    if variants := [name for name in present if name.endswith(".safetensors")]:
        raise refused(f"{part} holds only {variants[0]}, not one of {', '.join(f'{s}.safetensors' for s in STEMS)}")
    if pickled := [name for name in present if name.endswith(PICKLED)]:
        raise refused(f"{part / pickled[0]} is pickled, and loading it would run its code; save it as safetensors")
    raise refused(f"{part} holds no weights (.safetensors)")


def read_headers(files: list[Path]) -> dict[str, TensorInfo]:
    """Every tensor's name, dtype and shape. Raises OperatorError where a file is not whole safetensors."""
    return {name: info for file in files for name, info in read_header(file).items()}


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Layout: a little-endian u64 length, that much JSON, then the tensors up to the end of the file."""
    try:
        length = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES
            raw = stream.read(size) if 2 <= size < MAX_HEADER_BYTES else b""
    except OSError as error:
        raise refused(f"{file} can't be read: {error.strerror}") from None
    try:
        entries = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        tensors = {name: TensorInfo(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        end = 8 + size + max(entry["data_offsets"][1] for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        if len(raw) >= 2 and len(raw) < size:
            raise refused(f"{file} is cut off: it ends inside its header") from None
        raise refused(f"{file} is not a safetensors file with weights") from None
    if length != end:
        fault = "is cut off" if length < end else "has foreign bytes at its end"
        raise refused(f"{file} {fault}: {length} bytes, {end} expected")
    return tensors


def read_json(file: Path) -> Mapping[str, Any]:
    """A JSON object. Raises OperatorError where the file is missing or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise refused(f"{file} is missing") from None
    except ValueError:
        raise refused(f"{file} is not JSON") from None
    if not isinstance(content, dict):
        raise refused(f"{file} holds no settings")
    return content
