"""The identity of a text encoder: two that could differ in a value never share a cache entry, and the same weights do,
whichever model's folder they lie in and however they are stored there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from serve.models.tensor_tables import PROJECTION, Kind, stored_names, t5_feed_forward
from serve.models.text_parts import TextPart
from serve.models.weight_files import read_headers, read_json, weight_files

SCHEME = "tandem.encoder.1"
"""Version of the recipe behind `fingerprint`. Another recipe needs another name: the notes of old ones stay on disk."""
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_BLOCK = 1 << 24
"""Values of a tensor that are read at once: T5-XXL's embedding alone has 130 million."""


def fingerprint(part: TextPart, dtype: str, quantization: str, data_dir: Path) -> str:
    """32 hex digits over the trunk's tensors as `dtype` (a torch dtype's name) has them, what else the configuration
    says of the forward, `dtype` and `quantization`.

    Not in it: the tokenizer (units are token ids), the text projection (an output of its own), how the file spells
    names, shards tensors or stores values that `dtype` rounds to the same. Reading the weights takes about a second
    per GB (and little memory), so that the result is noted under `data_dir`; a folder that can't be written only costs
    that time again. Raises OperatorError or OSError where a file is gone or broken.
    """
    config = read_json(part.weights / "config.json")
    files = weight_files(part.weights)
    maths = (SCHEME, part.kind, dtype, quantization, json.dumps(_maths(part, config), sort_keys=True))
    stamps = tuple(_stamp(file) for file in files)
    return _noted(maths, stamps, tuple(files), part.kind, data_dir / "fingerprints")


def projection_id(part: TextPart, dtype: str) -> str | None:
    """8 hex digits that name the part's text projection, as `dtype` has it, among those of one trunk. None without."""
    if part.projection is None:
        return None
    file = _holders(tuple(weight_files(part.weights)), part.kind)[PROJECTION]
    return _projection_digest(file, _stamp(file[0]), dtype)


@lru_cache(maxsize=256)
def _noted(maths: tuple[str, ...], stamps: tuple[str, ...], files: tuple[Path, ...], kind: Kind, notes: Path) -> str:
    """The fingerprint from its note, else from the weights. A note is a file, named after all that it stands for."""
    note = notes / hashlib.blake2b("\0".join((*maths, *stamps)).encode(), digest_size=20).hexdigest()
    if kept := _read_note(note):
        return kept
    with _alone(notes):
        kept = _read_note(note)
        if kept is None:
            kept = _digest(maths, files, kind)
            _write_note(note, kept)
        return kept


def _digest(maths: tuple[str, ...], files: tuple[Path, ...], kind: Kind) -> str:
    dtype = maths[2]
    digest = hashlib.blake2b("\0".join(maths).encode(), digest_size=16)
    for name, holder in sorted(_holders(files, kind).items()):
        if name == PROJECTION:
            continue
        # transformers computes this one layer of a T5 in float32 where the rest is float16, which it would overflow.
        as_dtype = "float32" if kind != "clip" and dtype == "float16" and name.endswith(".wo.weight") else dtype
        digest.update(_tensor_digest(holder, name, as_dtype))
    return digest.hexdigest()


def _holders(files: tuple[Path, ...], kind: Kind) -> dict[str, tuple[Path, str]]:
    """Canonical name -> the file with the tensor, and its name there."""
    places = {name: file for file in files for name in read_headers([file])}
    return {name: (places[stored], stored) for name, stored in stored_names(places, kind).items()}


def _tensor_digest(holder: tuple[Path, str], name: str, dtype: str) -> bytes:
    file, stored = holder
    with safe_open(file, framework="pt", device="cpu") as weights:
        rows = weights.get_slice(stored)
        shape = rows.get_shape()
        digest = hashlib.blake2b(f"{name}\0{tuple(shape)}\0{dtype}\0".encode(), digest_size=32)
        step = max(1, _BLOCK // math.prod(shape[1:]))
        for start in range(0, shape[0], step):
            block = rows[start : start + step].to(getattr(torch, dtype)).contiguous()
            digest.update(block.view(-1).view(torch.uint8).numpy())
    return digest.digest()


@lru_cache(maxsize=256)
def _projection_digest(holder: tuple[Path, str], stamp: str, dtype: str) -> str:
    return _tensor_digest(holder, PROJECTION, dtype).hex()[:8]


def _maths(part: TextPart, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the tensors' names and shapes leave open about the forward, with transformers' defaults filled in."""
    if part.kind != "clip":
        act, gated = t5_feed_forward(config)
        return {
            "act": act,
            "gated": gated,
            "heads": config["num_heads"],
            "eps": float(config.get("layer_norm_epsilon", 1e-6)),
            "max_distance": config.get("relative_attention_max_distance", 128),
        }
    end = config.get("eos_token_id", 49407)
    return {
        "act": config.get("hidden_act", "quick_gelu"),
        "heads": config["num_attention_heads"],
        "eps": float(config.get("layer_norm_eps", 1e-5)),
        # 2 is how old configurations say "the largest id of the row", which is the end of text where that comes last.
        "end": part.vocab_size - 1 if end == 2 else end,
    }


def _stamp(file: Path) -> str:
    """Another one whenever the file's content may be another. A copy can set mtime back, but not ctime."""
    stat = file.stat()
    return f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}"


@contextmanager
def _alone(notes: Path) -> Iterator[None]:
    """The processes of one machine start together: one reads the weights, the others wait for its note."""
    with ExitStack() as stack:
        with suppress(OSError):
            notes.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context((notes / ".lock").open("w")), fcntl.LOCK_EX)
        yield


def _read_note(note: Path) -> str | None:
    try:
        kept = note.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return kept if _FINGERPRINT.fullmatch(kept) else None


def _write_note(note: Path, text: str) -> None:
    """Whole or not at all: a process may be killed at any moment."""
    partial = note.with_name(f".{note.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="ascii")
        partial.replace(note)
    except OSError:
        with suppress(OSError):
            partial.unlink()
