"""The figures of a run by name, out of its JSON: what two runs are compared by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def figures(told: Mapping[str, Any]) -> dict[str, float]:
    """CPU and latency in milliseconds, memory in megabytes, starts in seconds. A section that the run did not have has
    no figures. Raises KeyError or TypeError for the JSON of something else."""
    return dict(_figures(told))


def _figures(told: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    if (one := told["saturated"]) is not None:
        yield "saturated, over the bare engine", one["ratio"]["median"]
        yield "saturated, images/s", one["tandem"]["median"]
        yield "bare engine, images/s", one["bare"]["median"]
        yield "CPU of all others, over diffusion's", one["others"]["median"]
        for role, seconds in one["roles"].items():
            yield f"CPU ms an image: {role}", 1e3 * seconds
        for name, seconds in one["threads"].items():
            yield f"CPU ms an image: diffusion, {name}", 1e3 * seconds
        yield "CPU ms an image: client", 1e3 * one["client"]
    for one in told["overhead"]:
        name = f"{one['steps']} steps, {one['text']} text"
        yield f"{name}: added ms", 1e3 * one["added"]["median"]
        yield f"{name}: added ms, fetched", 1e3 * one["added_fetched"]["median"]
        for stage, seconds in one["stages"].items():
            yield f"{name}: {stage} ms", 1e3 * seconds
    if (costs := told["redis"]) is not None:
        for one in costs["costs"]:
            name = f"{one['dialect']}, {one['steps']} steps"
            yield f"{name}: Redis round trips", sum(one["trips"].values())
            yield f"{name}: Redis commands", sum(sum(by.values()) for by in one["calls"].values())
    if (starts := told["starts"]) is not None:
        if starts["ready"] is not None:
            yield "s to ready", starts["ready"]["median"]
        yield "s to the first image", starts["first_image"]["median"]
    for when in ("memory", "memory_later"):
        if told[when]:
            yield f"{when.replace('_', ' ')}: PSS MB", sum((one["pss"] or one["rss"]) / 1e6 for one in told[when])
