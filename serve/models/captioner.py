"""`captions.source` -> a checked folder of a model that describes pictures. No weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serve.models.weight_files import naming, read_headers, read_json, refused, weight_files
from serve.settings.pools import CaptionSettings

_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class CaptionerFolder:
    """A folder that transformers can load, as far as its files say."""

    name: str
    path: Path


def captioner_of(settings: CaptionSettings) -> CaptionerFolder | None:
    """None where none is set. Raises OperatorError naming `captions.source`."""
    if not settings.source:
        return None
    with naming("captions"):
        folder = Path(settings.source).expanduser().absolute()
        _check(folder)
    return CaptionerFolder(settings.model, folder)


def _check(folder: Path) -> None:
    """Whole safetensors of a kind that transformers has itself: code that came with a model is never run."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if not folder.is_dir():
        raise refused(f"{folder} is no folder")
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise refused(f"{folder}: its model_type {kind} is none of transformers' that describe pictures")
    if not any((folder / name).is_file() for name in _PROCESSORS):
        raise refused(f"{folder} lacks {_PROCESSORS[0]}: how a picture is made ready is not known")
    read_headers(weight_files(folder))
