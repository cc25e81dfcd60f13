"""The texts of a run on the device: what is mixed of them, and what is composed of the predictions for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import torch

from serve.diffusion.families.base import Family, Text
from serve.domain.conditioning import Mix, Phase, Schedule
from serve.domain.orders import ImageRequest
from serve.errors import GenerationFailed, InvalidRequest


@dataclass(frozen=True, slots=True)
class Sides:
    """What one forward pass reads of its phase. `positive` has the weight and the text of each noise prediction;
    `negative` is None where there is no guidance."""

    phase: Phase
    positive: tuple[tuple[float, Text], ...]
    negative: Text | None

    @property
    def texts(self) -> list[Text]:
        """One for each lane, the negative one first."""
        positive = [text for _, text in self.positive]
        return positive if self.negative is None else [self.negative, *positive]

    def guide(self, outputs: Sequence[torch.Tensor], cfg_scale: float) -> torch.Tensor:
        """One prediction of the outputs for `texts`: eps = eps_u + w sum_i w_i (eps_i - eps_u) (Liu et al. 2022,
        https://arxiv.org/abs/2206.01714), which is classifier-free guidance where there is one text. Without
        guidance that one's output is the prediction, whatever its weight."""
        if self.negative is None:
            (output,) = outputs
            return output
        unconditional, *conditional = outputs
        direction = torch.zeros_like(unconditional)
        for (weight, _), output in zip(self.positive, conditional, strict=True):
            direction += weight * (output - unconditional)
        return unconditional + cfg_scale * direction

    def same(self, phase: Phase) -> bool:
        """Whether that phase says the same."""
        return (phase.positive, phase.negative) == (self.phase.positive, self.phase.negative)


class Texts:
    """One run's texts, which its images share. Each is brought to the device once, when a step first reads it.

    A mix is made when an image comes to its phase, and is there as long as an image is at it: of a ramp's there are as
    many as steps that images are at, never all. It is added up in float32 and rounded to the denoiser's dtype once. A
    text that is read as it is, is not copied.

    Owns: the texts. Of the loop's thread.
    """

    def __init__(self, family: Family, schedule: Schedule) -> None:
        """`schedule` is one that `check` found nothing wrong with."""
        self.schedule = schedule
        self._family = family
        positive, negative = schedule.time_ids, schedule.negative_time_ids
        both = positive, positive if negative is None else negative
        self._time_ids = tuple(None if ids is None else family.place(ids) for ids in both)
        self._placed: dict[int, Text] = {}
        self._read: WeakValueDictionary[tuple[Mix, int], Text] = WeakValueDictionary()

    def at(self, step: int) -> Sides:
        """What the forward passes of this step of the client's read."""
        phase = self.schedule.at(step)
        positive = tuple((weight, self._text(mix, 0)) for weight, mix in phase.positive)
        return Sides(phase, positive, None if phase.negative is None else self._text(phase.negative, 1))

    def _text(self, mix: Mix, side: int) -> Text:
        """`side` is 0 for a positive text, 1 for a negative one: the two may have time ids of their own."""
        text = self._read.get((mix, side))
        if text is None:
            text = self._read[mix, side] = replace(self._mixed(mix), time_ids=self._time_ids[side])
        return text

    def _mixed(self, mix: Mix) -> Text:
        parts = [(share, self._place(index)) for share, index in mix if share != 0]
        if len(parts) == 1 and parts[0][0] == 1:
            return parts[0][1]
        like = self._place(mix[0][1] if mix else 0)
        context = _sum(like.context, [(share, text.context) for share, text in parts])
        if like.pooled is None:
            return Text(context)
        vectors = [(share, text.pooled) for share, text in parts if text.pooled is not None]
        return Text(context, _sum(like.pooled, vectors))

    def _place(self, index: int) -> Text:
        if index not in self._placed:
            self._placed[index] = self._family.text(self.schedule.texts[index])
        return self._placed[index]


def _sum(like: torch.Tensor, parts: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    total = torch.zeros_like(like, dtype=torch.float32)
    for share, tensor in parts:
        total.add_(tensor, alpha=share)
    return total.to(like.dtype)


def check(request: ImageRequest, schedule: Schedule) -> None:
    """Raises InvalidRequest for a composition without guidance: its predictions differ from nothing. Raises
    GenerationFailed where the text was made for another request, or mixes what can't be mixed."""
    if request.composed > 1 and not request.guided:
        raise InvalidRequest("prompt: AND needs guidance, that is a scale above 1", "prompt")
    for phase in schedule.phases:
        if len(phase.positive) != request.composed or (phase.negative is not None) is not request.guided:
            raise GenerationFailed("the text is not that of this request")
    if len({text.context.shape for text in schedule.texts}) > 1:
        for phase in schedule.phases:
            for mix in (*(mix for _, mix in phase.positive), phase.negative or ()):
                if len({schedule.texts[index].context.shape for _, index in mix}) > 1:
                    raise GenerationFailed("texts of unlike lengths can't be mixed")
