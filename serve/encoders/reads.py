"""The names of an encoder's outputs, read: how deep the forward must go for each, and what is taken out there."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SKIP = re.compile(r"skip:(0|[1-9][0-9]{0,3})(:norm)?")


@dataclass(frozen=True, slots=True)
class Read:
    """One output of a forward (see `EncodeUnit`): the hidden state after `depth` layers, with or without the final
    norm; if `pooled`, only its row at the end of text; if `projection`, that through the projection of this id."""

    depth: int
    norm: bool = False
    pooled: bool = False
    projection: str | None = None


def parse_output(output: str, layers: int) -> Read:
    """`output` of an encoder with so many layers. Raises ValueError for a name that says nothing here."""
    if output == "hidden":
        return Read(layers, norm=True)
    if output == "pooled":
        return Read(layers, norm=True, pooled=True)
    if output.startswith("projected:"):
        return Read(layers, norm=True, pooled=True, projection=output.removeprefix("projected:"))
    skip = _SKIP.fullmatch(output)
    if skip is None or int(skip[1]) > layers:
        raise ValueError(f"unknown encoder output {output!r}")
    return Read(layers - int(skip[1]), norm=skip[2] is not None)
