"""Where a job's time went: its stages as a chain, and how much of what the client waited they explain."""

from __future__ import annotations

from serve.domain.jobs import Timings

STAGES = (
    "admission",
    "retried",
    "queued",
    "claim",
    "text",
    "input",
    "source",
    "batch",
    "steps",
    "decode_wait",
    "decode",
    "compress",
    "put",
    "told",
)
"""In the order in which a job goes through them; `NAME_s` is the field of `Timings`."""


def stages(timings: Timings) -> tuple[tuple[str, float], ...]:
    """(stage, seconds) of those that the job went through, in their order. Between `put` and `told` lies the
    settlement's round trip, which no stage holds."""
    told = ((name, getattr(timings, f"{name}_s")) for name in STAGES)
    return tuple((name, seconds) for name, seconds in told if seconds is not None)


def wall_s(timings: Timings) -> float | None:
    """From the order's arrival until its end was read, as far as both are known; None before the job's end."""
    if timings.total_s is None:
        return None
    return (timings.admission_s or 0.0) + timings.total_s + (timings.told_s or 0.0)


def explained(timings: Timings) -> float | None:
    """The share of `wall_s` that the stages hold, 1 for all of it; None before the job's end."""
    wall = wall_s(timings)
    return sum(seconds for _, seconds in stages(timings)) / wall if wall else None
