"""A request's text -> what to encode, and the arithmetic on it. Family `sd`: one row, one encoder, the head is kept."""

from __future__ import annotations

from dataclasses import dataclass

from serve.domain import EncodeUnit, ImageRequest, Truncation
from serve.prompts.grammar import parse
from serve.prompts.tokenizers import PromptTokenizer


@dataclass(frozen=True, slots=True)
class SidePlan:
    """One side of the guidance. `weights` has one factor per token of the units' rows; 1 for begin, end and padding."""

    units: tuple[EncodeUnit, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """`negative` is None where the request has no guidance: nothing is encoded that no step reads."""

    positive: SidePlan
    negative: SidePlan | None
    truncated: tuple[Truncation, ...] = ()

    @property
    def units(self) -> tuple[EncodeUnit, ...]:
        """Every unit that the plan needs, once, positive first."""
        sides = (self.positive,) if self.negative is None else (self.positive, self.negative)
        return tuple(dict.fromkeys(unit for side in sides for unit in side.units))


class Planner:
    """Compiles requests. The same request gives the same plan in every process, on every attempt."""

    def __init__(self, tokenizer: PromptTokenizer, encoder_fingerprint: str) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder_fingerprint

    def plan(self, request: ImageRequest) -> PromptPlan:
        """Raises InvalidRequest that names `prompt` or `negative_prompt`; both are checked, whether used or not."""
        positive, cut = self._side(request.prompt, "prompt")
        negative, cut_negative = self._side(request.negative_prompt, "negative_prompt")
        if not request.guided:
            return PromptPlan(positive, None, cut)
        return PromptPlan(positive, negative, cut + cut_negative)

    def _side(self, text: str, field: str) -> tuple[SidePlan, tuple[Truncation, ...]]:
        ids: list[int] = []
        weights: list[float] = []
        rest: list[str] = []
        limit = self._tokenizer.limit
        for span in parse(text, field):
            tokens = self._tokenizer.tokenize(span.text)
            room = limit - len(ids)
            if room < len(tokens.ids):
                rest.append(span.text[tokens.starts[room] :] if room > 0 else span.text)
            ids += tokens.ids
            weights += [span.weight] * len(tokens.ids)
        row = self._tokenizer.row(tuple(ids[:limit]))
        pad = [1.0] * (len(row) - 1 - len(weights[:limit]))
        side = SidePlan((EncodeUnit(self._encoder, row),), (1.0, *weights[:limit], *pad))
        cut = Truncation(field=field, tokens=len(ids), limit=limit, text="".join(rest).strip())
        return side, (cut,) if len(ids) > limit else ()
