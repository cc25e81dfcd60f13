"""Parts of a diffusers folder, loaded whole or refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from serve.diffusion.families.stock import DiffusionPipeline, diffusers_schedulers
from serve.errors import OperatorError
from serve.models import ModelFolder


@contextmanager
def loading(name: str, setting: str = "model.source") -> Iterator[None]:
    """Whatever goes wrong with the files of `name` becomes an OperatorError of one line that names `setting`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OperatorError(f"{setting}: {name} can't be loaded: {reason}", setting) from error


def load_part(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The part in eval mode, its weights in `dtype`, on the CPU.

    Raises ValueError for a tensor that is missing (diffusers would fill it with random numbers), OSError or
    RuntimeError for what can't be read.
    """
    part, report = cls.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder.name} has no tensor {missing[0]} ({len(missing)} missing)")
    return part.eval().requires_grad_(False)


def pipeline_class(model: ModelFolder) -> str:
    """Name of the stock pipeline that the folder was made for."""
    return str(DiffusionPipeline.load_config(model.path, local_files_only=True)["_class_name"])


def load_scheduler(model: ModelFolder, mend: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model's own sampler: its class and configuration, mended as the stock pipeline's constructor mends old ones.

    `mend` counts only for options that the configuration has.
    """
    name = DiffusionPipeline.load_config(model.path, local_files_only=True)["scheduler"][1]
    cls = getattr(diffusers_schedulers, name, None)
    if cls is None:
        raise ValueError(f"scheduler {name} is not one of diffusers'")
    try:
        written = cls.load_config(model.path / "scheduler", local_files_only=True)
        config = dict(cls.from_config(written).config)
    except ImportError:  # diffusers stands another class in for one whose library is not here
        raise ValueError(f"its sampler {name} needs a library that is not served (scipy or torchsde)") from None
    config.pop("_use_default_values", None)  # what it names would fall back to the class's default once more
    return cls, config | {name: value for name, value in mend.items() if name in config}
