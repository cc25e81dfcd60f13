"""A text encoder's weights, from its folder into transformers' modules: all of them, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModel, T5EncoderModel, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from serve.encoders.trunk import ClipTrunk, T5Trunk, Trunk, Umt5Trunk
from serve.models import TextPart
from serve.models.tensor_tables import PROJECTION, Kind, canonical, stored_names
from serve.models.weight_files import naming, read_header, read_headers, refused, weight_files

_CLASSES: Mapping[Kind, tuple[Any, type[Trunk]]] = {
    "clip": (CLIPTextModel, ClipTrunk),
    "t5": (T5EncoderModel, T5Trunk),
    "umt5": (UMT5EncoderModel, Umt5Trunk),
}


def classes_of(kind: Kind) -> tuple[Any, type[Trunk]]:
    """transformers' class, and the trunk over it."""
    return _CLASSES[kind]


def load_trunk(part: TextPart, dtype: torch.dtype, projections: Mapping[str, TextPart]) -> Trunk:
    """The trunk of `part` on the CPU in `dtype`, with the text projection of each id from the part that has it.

    Raises OperatorError with the tensor's name where one is missing, foreign or of another shape, and the file's where
    it is gone or cut. T5 in float16 keeps the last layer of each feed-forward (`wo`) in float32, which its values would
    overflow otherwise; transformers does so itself, and the stock pipelines with it.
    """
    with naming(part.setting):
        model = _model(part, dtype)
    heads = {}
    for name, each in projections.items():
        with naming(each.setting):
            heads[name] = _projection(each, dtype)
    _, trunk = _CLASSES[part.kind]
    return trunk(model.eval().requires_grad_(False), dtype, heads)


def _model(part: TextPart, dtype: torch.dtype) -> Any:
    """transformers' module, checked."""
    cls, _ = _CLASSES[part.kind]
    try:
        with _quiet():
            model, report = cls.from_pretrained(
                part.weights,
                dtype=dtype,
                attn_implementation="sdpa",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the report names them; they are refused below
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        read_headers(weight_files(part.weights))  # says which file is gone or cut, where one is
        raise refused(f"{part.weights} can't be loaded ({type(error).__name__})") from error
    _check(part, report)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers prints a table of what it did not use; `_check` says what matters of it."""
    transformers_logging.disable_progress_bar()
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _check(part: TextPart, report: Mapping[str, Iterable[Any]]) -> None:
    """transformers goes on with random numbers where tensors are missing or don't fit, and past those it has no use
    for. Spare are those that say nothing about the trunk."""
    spare = {None, PROJECTION} if part.kind == "clip" else {None}
    faults = {
        "its weights lack": sorted(report["missing_keys"]),
        "it does not fit the shape of": sorted(str(entry[0]) for entry in report["mismatched_keys"]),
        "its configuration does not explain the tensor": sorted(
            name for name in report["unexpected_keys"] if canonical(name, part.kind) not in spare
        ),
    }
    for fault, names in faults.items():
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise refused(f"{part.weights}: {fault} {names[0]}{rest}")


def _projection(part: TextPart, dtype: torch.dtype) -> torch.Tensor:
    """(projection width, width)."""
    for file in weight_files(part.weights):
        name = stored_names(read_header(file), part.kind).get(PROJECTION)
        if name is not None:
            with safe_open(file, framework="pt", device="cpu") as weights:
                tensor: torch.Tensor = weights.get_tensor(name)
            return tensor.to(dtype)
    raise refused(f"{part.weights}: its weights lack {PROJECTION}")
