"""How long a replica may seem to do nothing before it counts as hung."""

from __future__ import annotations

from serve.rungs import MEANS, Rung
from serve.settings.pools import DiffusionSettings

GPU_STALL_S, CPU_STALL_S = 20.0, 120.0
KNOWN = 5.0
"""What is known to be slow (a step, a decoding) may take this many times as long: other work beside it, a first step of
its size, a clock that the card lowered."""


def stall_s(settings: DiffusionSettings, device: str, rung: Rung = Rung.RESIDENT) -> float:
    """Seconds without any progress that are no reason for concern on this kind of device (`cpu`, `cuda`, `mps`), or on
    a rung of the memory ladder that has left it.

    What compiles may take minutes on a GPU too.
    """
    if settings.stall_s is not None:
        return settings.stall_s
    on_cpu = device == "cpu" or not MEANS[rung].on_card
    return CPU_STALL_S if on_cpu or settings.compile else GPU_STALL_S


def allowed_s(stall_s: float, *known_s: float) -> float:
    """The same where what is in hand takes so many seconds a piece, as far as that is known."""
    return max(stall_s, KNOWN * max(known_s, default=0.0))
