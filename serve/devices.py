"""Which device a replica computes on, and how much of it."""

from __future__ import annotations

import os

import torch

from serve.errors import OperatorError


def claim_device(device: str, num_gpus: float, setting: str) -> torch.device:
    """The device of that name, or for `auto` the best one here: cuda, then mps, then cpu.

    A replica that holds a fraction of a GPU is held to that fraction of its memory: Ray does not do it. Raises
    OperatorError naming `setting` where there is no such device.
    """
    name = device if device != "auto" else best_device()
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present[name]:
        raise OperatorError(f"{setting}: there is no {name} device here", setting)
    if name == "cuda" and 0 < num_gpus < 1:
        torch.cuda.set_per_process_memory_fraction(num_gpus)
    return torch.device(name)


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def use_threads(threads: int | None) -> None:
    """CPU threads of this process; None leaves one core to the rest of the server.

    Ray would leave a replica one for each CPU that it reserves. Threads that wait for each other at every small
    operation lose more by sharing a core than they win by another.
    """
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) - 1))
