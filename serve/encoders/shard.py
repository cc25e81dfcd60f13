"""A text encoder that is larger than one device: its layers in order over several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model  # type: ignore[import-untyped]
from torch import nn

Place = int | str
"""A device as accelerate's maps name it: the number of a GPU, `cpu`, or `disk`, whence layers are read to run."""


def devices_here(device: str) -> tuple[Place, ...]:
    """The devices that a replica may spread a model over: all GPUs that it sees, else its one device."""
    if device == "cuda":
        return tuple(range(torch.cuda.device_count()))
    return (device,)


def plan_map(model: nn.Module, places: Sequence[Place]) -> dict[str, Place]:
    """Module -> place, for each module that is moved as a whole: embeddings first, then layers, the final norm last.

    Layers are never split, since a layer adds its input to its output. Each place gets about the same bytes, and no
    place is come back to, so that a forward crosses from one to the next only once.
    """
    units = _units(model)
    total = sum(units.values())
    placed: dict[str, Place] = {}
    before = 0
    for name, size in units.items():
        # By the middle of the unit: a large one goes where most of it lies.
        placed[name] = places[min(len(places) - 1, int((before + size / 2) * len(places) / max(1, total)))]
        before += size
    return placed


def spread(model: nn.Module, placed: Mapping[str, Place], offload: Path | None = None) -> None:
    """Move the modules to their places; hooks then move what goes from one to the next. `offload` is the folder for
    the weights of modules on `disk`."""
    dispatch_model(model, dict(placed), offload_dir=offload)


def _units(model: nn.Module) -> dict[str, int]:
    """Name -> bytes, in the order in which a forward comes by. A tied weight counts where it comes first."""
    units: dict[str, int] = {}
    seen: set[int] = set()
    whole = tuple(getattr(model, "_no_split_modules", None) or ())

    def size(module: nn.Module) -> int:
        fresh = {id(each): each.nbytes for each in (*module.parameters(), *module.buffers()) if id(each) not in seen}
        seen.update(fresh)
        return sum(fresh.values())

    def visit(module: Any, name: str) -> None:
        children = list(module.named_children())
        if name and (not children or type(module).__name__ in whole):
            units[name] = size(module)
            return
        for child, each in children:
            visit(each, f"{name}.{child}" if name else child)

    visit(model, "")
    return units
