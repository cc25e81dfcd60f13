"""A measured profile on disk: one JSON file for all that step times depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from serve.diffusion.curves import Curve
from serve.diffusion.runner import Runner
from serve.diffusion.scheduler import LatentShape
from serve.models import ModelFolder
from serve.models.weight_files import weight_files
from serve.settings.pools import DiffusionSettings

log = logging.getLogger(__name__)

SCHEME = "tandem.profile.3"
"""Version of how profiles are measured and written: another one measures again."""


@dataclass(frozen=True, slots=True)
class Measured:
    """`too_large` are shapes of which not even one lane fits the memory. `cut_s` is the time that was not enough to
    measure everything, None where it was."""

    curves: tuple[Curve, ...]
    too_large: tuple[LatentShape, ...]
    cut_s: float | None


def read(what: Mapping[str, Any], data_dir: Path) -> Measured | None:
    """The profile of that `identity`, None where there is none that can be used."""
    file = _file(what, data_dir)
    try:
        return _parsed(json.loads(file.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s can't be used and is measured again: %s", file, error)
        return None


def write(measured: Measured, what: Mapping[str, Any], data_dir: Path) -> None:
    """Whole or not at all, whoever else writes. A folder that can't be written only costs measuring again."""
    file = _file(what, data_dir)
    content = {
        "what": what,
        "cut_s": measured.cut_s,
        "too_large": measured.too_large,
        "curves": [
            {"shape": curve.shape, "cap": curve.cap, "ms": {str(lanes): ms for lanes, ms in curve.ms.items()}}
            for curve in measured.curves
        ],
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as out:
                json.dump(content, out, indent=1)
            Path(name).replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        log.warning("the profile can't be kept in %s: %s", file.parent, error)


def _parsed(content: Any) -> Measured:
    """Raises ValueError, KeyError, TypeError or AttributeError where it is not what `write` writes."""
    curves = []
    for entry in content["curves"]:
        height, width = (int(side) for side in entry["shape"])
        ms = {int(lanes): float(value) for lanes, value in entry["ms"].items()}
        cap = int(entry["cap"])
        if (
            not ms
            or min(height, width, cap, *ms) < 1
            or not all(value > 0 and math.isfinite(value) for value in ms.values())
        ):
            raise ValueError("numbers that no measurement gives")
        curves.append(Curve((height, width), ms, cap))
    too_large = tuple((int(height), int(width)) for height, width in content["too_large"])
    if not curves or any(min(shape) < 1 for shape in too_large):
        raise ValueError("numbers that no measurement gives")
    cut_s = content["cut_s"]
    return Measured(tuple(curves), too_large, None if cut_s is None else float(cut_s))


def _file(what: Mapping[str, Any], data_dir: Path) -> Path:
    digest = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()
    return data_dir / "profiles" / f"{digest}.json"


def identity(
    runner: Runner, model: ModelFolder, settings: DiffusionSettings, shapes: Sequence[LatentShape]
) -> dict[str, Any]:
    """All that step times and memory depend on. Of the weights, their shapes: other values take the same time. Of the
    VAE, what its memory beside a step depends on: its configuration, which with the family's precision gives its own.
    """
    parts = [folder for name in ("unet", "transformer") if (folder := model.path / name).is_dir()]
    return {
        "scheme": SCHEME,
        "family": model.family,
        "configs": [(part / "config.json").read_text() for part in [*parts, model.path / "vae"]],
        "weights": [[file.name, file.stat().st_size] for part in parts for file in weight_files(part)],
        "dtype": str(runner.family.dtype),
        "rung": runner.family.rung,
        "device": _device(runner.family.device),
        "num_gpus": settings.num_gpus,
        "max_batch_size": settings.max_batch_size,
        "shapes": [list(shape) for shape in shapes],
        "channels_last": settings.channels_last,
        "compile": settings.compile,
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
    }


def _device(device: torch.device) -> list[object]:
    """The kind of device, not the one: replicas on equal nodes that share a folder share their profiles."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        # By its plan a process may have less than the card, and with another plan more.
        return [properties.name, int(properties.total_memory * torch.cuda.get_per_process_memory_fraction(device))]
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return [device.type, platform.machine(), cpu, os.cpu_count(), torch.get_num_threads()]
