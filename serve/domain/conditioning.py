"""Texts as the denoiser reads them, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The text side of one image at one step, ready for the denoiser: float32 tensors on the CPU.

    `positive` and `negative` are (tokens, width), the pooled ones (width,), where the family has them. `negative` is
    None when the request has no guidance. `time_ids` are SDXL's six: original size, crop, target size (height first);
    its refiner has five, the last an aesthetic score, and others for the negative side.
    """

    positive: torch.Tensor
    negative: torch.Tensor | None
    pooled: torch.Tensor | None = None
    negative_pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None
    negative_time_ids: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """One text as the denoiser reads it: float32 tensors on the CPU. `context` is (tokens, width), `pooled` (width,)
    where the family has one."""

    context: torch.Tensor
    pooled: torch.Tensor | None = None


Mix: TypeAlias = tuple[tuple[float, int], ...]
"""Shares of texts, each named by its index: the sum of share times embedding. The shares need not add up to 1."""


@dataclass(frozen=True, slots=True)
class Phase:
    """The text from step `first` on. `positive` has a weight and a mix for each noise prediction, one unless the
    prompt is a composition (`AND`); `negative` is None where there is no guidance."""

    first: int
    positive: tuple[tuple[float, Mix], ...]
    negative: Mix | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """The text of every step: phases in rising order, the first from step 0, over `texts`, which have one shape.

    Steps are those that the client asked for. All phases have as many positive mixes and all a negative one, or none.
    """

    texts: tuple[TextEmbedding, ...]
    phases: tuple[Phase, ...]
    time_ids: torch.Tensor | None = None
    negative_time_ids: torch.Tensor | None = None

    @classmethod
    def constant(cls, conditioning: Conditioning) -> Schedule:
        positive = TextEmbedding(conditioning.positive, conditioning.pooled)
        ids = conditioning.time_ids, conditioning.negative_time_ids
        if conditioning.negative is None:
            return cls((positive,), (Phase(0, ((1.0, ((1.0, 0),)),)),), *ids)
        negative = TextEmbedding(conditioning.negative, conditioning.negative_pooled)
        return cls((positive, negative), (Phase(0, ((1.0, ((1.0, 0),)),), ((1.0, 1),)),), *ids)

    def at(self, step: int) -> Phase:
        return next(phase for phase in reversed(self.phases) if phase.first <= step)
