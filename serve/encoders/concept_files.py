"""The file of a learned concept (textual inversion) <-> its vectors. Safetensors alone is read: never a pickle.

What people have: one tensor under any name (diffusers puts the token there, A1111 `emb_params`), for a model's one text
encoder; or a tensor for each encoder, by the names that SDXL's and SD 3's trainers gave them (`clip_l`, `clip_g`,
`t5xxl`).
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from serve.models import ModelFolder, TextPart
from serve.models.weight_files import PICKLED
from serve.prompts.concepts import ConceptFault, ConceptRef
from serve.prompts.families import T5_OPTIONAL
from serve.prompts.places import CONCEPT

NAME = re.compile(CONCEPT)
SUFFIX = ".safetensors"
MAX_VECTORS = 75
"""Of one concept for one encoder: as many as a CLIP's row has room for, so that no concept is ever cut."""
MAX_BYTES = 16 * 1024 * 1024
"""Of a file; 75 vectors for SD 3's three encoders, in float64, are 4 MB."""
LARGEST = 65504.0
"""Largest value of a vector: float16's, which any encoder may run in."""

_KEYS: Mapping[str, str] = {
    "clip_l": "clip_l",
    "text_encoders_0": "clip_l",
    "clip_g": "clip_g",
    "text_encoders_1": "clip_g",
    "clip_h": "clip_h",
    "t5xxl": "t5xxl",
    "t5": "t5xxl",
}
"""Spellings of the names that say which encoder a tensor is for."""
_READERS: Mapping[str, Mapping[str, str]] = {
    "sd": {"clip_l": "text_encoder", "clip_h": "text_encoder"},
    "sdxl": {"clip_l": "text_encoder", "clip_g": "text_encoder_2"},
    "sdxl_refiner": {"clip_g": "text_encoder_2"},
    "sd3": {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"},
    "flux": {"clip_l": "text_encoder", "t5xxl": "text_encoder_2"},
    "pixart": {"t5xxl": "text_encoder"},
    "auraflow": {},
}
"""Family -> name -> the role that reads it."""
_ALONE = "emb_params"
"""A1111's name for the vectors of a model that has one encoder."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """Vectors for one encoder: `values` is (n, width), float32 on the CPU. `key` names the encoder, None where the file
    does not say which. `digest`, 40 hex digits, is of the values."""

    key: str | None
    values: torch.Tensor
    digest: str

    @property
    def width(self) -> int:
        return int(self.values.shape[1])


def read_concept(file: Path) -> tuple[Vectors, ...]:
    """What the file holds, at least one. Raises ConceptFault, whose text begins with the file's name."""
    name = file.name
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConceptFault(f"{name} can't be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise ConceptFault(f"{name} is over {MAX_BYTES >> 20} MiB, which no concept needs")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError):  # the last four: a dtype that is unknown
        raise ConceptFault(f"{name} is not a whole safetensors file") from None
    if not tensors:
        raise ConceptFault(f"{name} holds no vectors")
    found: dict[str | None, Vectors] = {}
    for spelled, tensor in tensors.items():
        key = _KEYS.get(spelled)
        if key is None and len(tensors) > 1:
            raise ConceptFault(f"{name} holds {_told(spelled)}; of several tensors each is {', '.join(_KEYS)}")
        if key in found:
            raise ConceptFault(f"{name} holds vectors for {key} twice")
        found[key] = _checked(f"{name}: {_told(spelled)}", key, tensor)
    return tuple(found.values())


def write_concept(
    file: Path, model: ModelFolder, vectors: Mapping[str, torch.Tensor], notes: Mapping[str, str] = {}
) -> None:
    """Vectors by role, (n, width) each, as `read_concept` and other programs read them: `emb_params` for a model of one
    encoder, else by the encoders' names. In place at once, or not at all. `notes` go into the file's header. Raises
    OSError, and ConceptFault for vectors that would not be read again."""
    keys = {role: key for key, role in reversed(list(_READERS[model.family].items()))}
    if len(model.text) == 1:
        keys = {model.text[0].role: _ALONE}
    checked = {keys[role]: _checked(role, None, tensor.detach().cpu()) for role, tensor in vectors.items()}
    tensors = {key: each.values for key, each in checked.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_bytes(save(tensors, dict(notes)))
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def refuse_pickle(file: Path) -> ConceptFault:
    return ConceptFault(f"{file.name} is pickled, and reading it would run its code; only safetensors are read")


def is_pickle(file: Path) -> bool:
    return file.suffix in PICKLED


def digest_of(values: torch.Tensor) -> str:
    """Of (n, width) float32 on the CPU. The shape goes in: other vectors may be the same bytes."""
    shape = struct.pack("<2q", *values.shape)
    return hashlib.blake2b(shape + values.contiguous().numpy().tobytes(), digest_size=20).hexdigest()


def fit(name: str, concept: tuple[Vectors, ...], model: ModelFolder) -> dict[str, Vectors]:
    """By role of the model, in role order. Raises ConceptFault where vectors are for no encoder that the model has, or
    of another width than it reads.

    Vectors without a key are for the first encoder of their width. Those for a T5 that the model does without are left.
    A role that the file says nothing for is not in the result.
    """
    roles = {part.role: part for part in model.text}
    placed: dict[str, Vectors] = {}
    for vectors in concept:
        part = _reader(vectors, model, roles)
        if part is None and vectors.key == "t5xxl" and model.family in T5_OPTIONAL:
            continue
        if part is None or part.width != vectors.width:
            own = f"{vectors.width} wide" + (f" for {vectors.key}" if vectors.key else "")
            here = ", ".join(f"{each.width} ({each.name})" for each in ([part] if part else model.text))
            raise ConceptFault(f"<{name}> has vectors {own}; {model.name} reads {here}")
        placed[part.role] = vectors
    if not placed:
        raise ConceptFault(f"<{name}> has vectors for a T5 alone, which {model.name} does without")
    return {role: placed[role] for role in roles if role in placed}


def refs(placed: Mapping[str, Vectors]) -> dict[str, ConceptRef]:
    return {role: ConceptRef(vectors.digest, len(vectors.values)) for role, vectors in placed.items()}


def _reader(vectors: Vectors, model: ModelFolder, roles: Mapping[str, TextPart]) -> TextPart | None:
    """Who reads them, by the key where there is one, else by the width."""
    if vectors.key is not None:
        return roles.get(_READERS[model.family].get(vectors.key, ""))
    return next((part for part in roles.values() if part.width == vectors.width), None)


def _checked(place: str, key: str | None, tensor: torch.Tensor) -> Vectors:
    if tensor.ndim == 1:
        tensor = tensor.unsqueeze(0)
    if tensor.ndim != 2 or tensor.dtype not in _FLOATS or not tensor.numel():
        raise ConceptFault(f"{place} is {tensor.dtype} {list(tensor.shape)}, not vectors (n, width) of floats")
    if len(tensor) > MAX_VECTORS:
        raise ConceptFault(f"{place} has {len(tensor)} vectors; {MAX_VECTORS} fit into a row")
    values = tensor.to(torch.float32).contiguous()
    if not bool((values.abs() <= LARGEST).all()):  # False where anything is no number
        raise ConceptFault(f"{place} holds values that are no numbers, or beyond {LARGEST:g}")
    return Vectors(key, values, digest_of(values))


def _told(spelled: str) -> str:
    """A name from a file, on one line and not too long for one."""
    line = " ".join("".join(each if each.isprintable() else " " for each in spelled).split())
    return repr(line if len(line) <= 40 else f"{line[:39]}…")
