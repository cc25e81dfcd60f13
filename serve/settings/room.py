"""What every group of settings is, and the words that several of them share."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

MIB = 1024 * 1024
MOST_STEPS = 100_000
"""Beyond what anybody draws, and what times are still predicted for."""
Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["float32", "float16", "bfloat16"]
RungName = Literal[
    "resident",
    "vae_slicing",
    "vae_tiling",
    "attention_slicing",
    "int8",
    "int4",
    "offload",
    "sequential_offload",
    "cpu",
]
"""`serve.rungs.Rung`, as the settings write it."""


class Room(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
