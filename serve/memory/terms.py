"""What is counted, and in which words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Dtype = Literal["float32", "float16", "bfloat16"]

BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Of one number, by dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The architecture of a denoiser and its VAE, as far as memory and time depend on it: from the configurations and
    tensor headers of a diffusers folder, or from the table of published models.

    `family` is the engine's. `denoiser` and `vae` are the two configurations as diffusers writes them. Numbers of the
    denoiser's weights: `parameters` are all, `linear` those of the linear layers inside its repeated blocks, which
    quantization packs; `outside` those in no repeated block, `largest_block` those of the largest one, what offloading
    holds two of; `largest_layer` those of the largest single layer, `loose` those that are no layer's (tables of
    positions). `vae_parameters` are all of the VAE's. `text_tokens` is the longest context of one row.
    """

    name: str
    family: str
    parameters: int
    linear: int
    outside: int
    largest_block: int
    largest_layer: int
    loose: int
    vae_parameters: int
    vae_scale_factor: int
    size_multiple: int
    default_width: int
    default_height: int
    guided: bool
    text_tokens: int
    denoiser: Mapping[str, Any]
    vae: Mapping[str, Any]

    @property
    def lanes(self) -> int:
        """Batch entries of one image as most order it."""
        return 2 if self.guided else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of device memory, by phase. `weights` lie there all the time (under offloading: what of them is there at
    most); `step`, `decode` and `encode` are what the phase takes on top: activations and workspaces. `beside` says
    whether one image may be decoded while others step."""

    weights: int
    step: int
    decode: int
    encode: int
    beside: bool

    @property
    def peak(self) -> int:
        vae = max(self.decode, self.encode)
        return self.weights + (self.step + vae if self.beside else max(self.step, vae))
