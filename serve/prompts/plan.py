"""A request's text -> what to encode, and the arithmetic on it, for all families.

The plan says what the stock diffusers pipelines do in `encode_prompt`; `families.READS` has the outputs they read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from serve.domain.conditioning import Phase
from serve.domain.text import Syntax, TextRequest, TokenCount, Truncation
from serve.errors import InvalidRequest
from serve.models import ModelFolder
from serve.prompts.ast import Composition
from serve.prompts.concepts import Concepts, NoConcepts
from serve.prompts.families import (
    LOWERED,
    READS,
    T5_OPTIONAL,
    T5_TOKENS,
    UNPADDED,
    ZERO_FILLED,
    time_ids,
)
from serve.prompts.flats import MAX_TEXTS
from serve.prompts.naming import Names
from serve.prompts.parse import parse
from serve.prompts.placing import Draft, check_size, place
from serve.prompts.planned import Block, Column, PromptPlan, TextPlan, UnitRead, Vector
from serve.prompts.readers import Reader, Source
from serve.prompts.rows import lowered
from serve.prompts.timeline import Lanes, Timeline, timeline
from serve.prompts.tokenizers import PromptTokenizer

__all__ = [
    "Block",
    "Column",
    "Planner",
    "PromptPlan",
    "Source",
    "TextPlan",
    "TokenCount",
    "UnitRead",
    "Vector",
]


MAX_UNITS = 512
"""Units of one request: what it can cost the text encoders."""


class Planner:
    """Compiles one model's requests. The same request gives the same plan in every process, on every attempt, as long
    as the concepts that it names are the same.

    Owns: the model's tokenizers. Safe to share between threads.
    """

    def __init__(self, model: ModelFolder, sources: Mapping[str, Source], concepts: Concepts | None = None) -> None:
        """`sources` by role, one for each of the model's. Raises OperatorError where a tokenizer can't be loaded."""
        self.model = model
        self.sources = sources
        self.concepts: Concepts = NoConcepts() if concepts is None else concepts
        self._readers = tuple(Reader.of(sources[part.role], READS[model.family][part.role]) for part in model.text)
        clips = [reader for reader in self._readers if reader.context and not reader.is_t5]
        self._max_skip = min((reader.source.part.layers - 1 for reader in clips), default=None)

    @property
    def tokenizers(self) -> Mapping[str, PromptTokenizer]:
        """By role."""
        return {reader.role: reader.tokenizer for reader in self._readers}

    def plan(self, request: TextRequest) -> PromptPlan:
        """Raises InvalidRequest that names the field of `request` at fault.

        Clip skip is for the prompt alone, as in the stock pipelines: a negative prompt is read from the default layer.
        """
        t5_tokens = self._check(request)
        has_t5 = request.use_t5 and any(reader.is_t5 for reader in self._readers)
        names = Names(self.concepts)
        positive = self._timeline("prompt", request.prompt, request)
        drafts = self._drafts("prompt", request.prompt, positive, request, t5_tokens, names)
        negative = None
        if request.negative_prompt is not None:
            negative = self._timeline("negative_prompt", request.negative_prompt, request)
            if len(drafts) + len(negative.texts) > MAX_TEXTS:
                raise InvalidRequest(
                    f"negative_prompt: the steps make more than {MAX_TEXTS} texts of it and the prompt together",
                    "negative_prompt",
                )
            drafts += self._drafts("negative_prompt", request.negative_prompt, negative, request, t5_tokens, names)
        ids, negative_ids = time_ids(self.model.family, request.height, request.width)
        truncated, tokens = _told(drafts)
        phases = _phases(positive, negative)
        plan = PromptPlan(
            family=self.model.family,
            context_width=self.model.context_width,
            texts=self._placed(drafts, phases, request),
            phases=phases,
            weighting=request.weighting,
            zero_rows=0 if has_t5 else t5_tokens,
            context_tokens=t5_tokens if self.model.family in ZERO_FILLED else 0,
            time_ids=ids,
            negative_time_ids=None if negative is None else negative_ids,
            truncated=truncated,
            tokens=tokens,
        )
        if len(plan.units) > MAX_UNITS:
            raise InvalidRequest(
                f"prompt: {len(plan.units)} rows of text encoders would be read for it, and at most {MAX_UNITS} are",
                "prompt",
            )
        return plan

    def _timeline(self, field: str, text: str, request: TextRequest) -> Timeline:
        prompt = parse(text, field, request.syntax)
        if isinstance(prompt, Composition) and field != "prompt":
            raise InvalidRequest(f"{field}: AND is for the prompt alone, there is one negative text", field)
        return timeline(prompt, request.num_inference_steps, field)

    def _drafts(
        self, field: str, written: str, line: Timeline, request: TextRequest, t5_tokens: int, names: Names
    ) -> list[Draft]:
        drafts = []
        for flat, slot in zip(line.texts, line.slots, strict=True):
            if not flat and field == "negative_prompt" and self.model.zero_empty_negative:
                drafts.append(Draft(field, flat, slot, (), zero=True))
                continue
            named = names.resolve(flat, field, written, bare=request.syntax is not Syntax.PLAIN)
            if self.model.family in LOWERED:
                named = lowered(named)
            laid = (
                reader.lay_out(
                    named,
                    names.refs,
                    reader.source.part.row_tokens or t5_tokens,
                    request.long_prompt,
                    field,
                    padded=self.model.family not in UNPADDED,
                )
                for reader in self._readers
                if request.use_t5 or not reader.is_t5
            )
            draft = Draft(field, named, slot, tuple(laid))
            check_size(len(line.texts), sum(draft.heights), field)  # before all of them are read
            drafts.append(draft)
        return drafts

    def _placed(self, drafts: Sequence[Draft], phases: Sequence[Phase], request: TextRequest) -> tuple[TextPlan, ...]:
        """Contexts of one shape. Where the denoiser hides what is missing, a context ends with its text, and only those
        that are mixed have one shape."""
        if self.model.family not in UNPADDED - ZERO_FILLED:
            return place(drafts, request)
        mixes = {mix for phase in phases for mix in (*(mix for _, mix in phase.positive), phase.negative or ())}
        mixed = sorted({index for mix in mixes if len(mix) > 1 for _, index in mix})
        plans = {index: place([draft], request)[0] for index, draft in enumerate(drafts) if index not in mixed}
        if mixed:
            plans |= zip(mixed, place([drafts[index] for index in mixed], request), strict=True)
        return tuple(plans[index] for index in range(len(drafts)))

    def _check(self, request: TextRequest) -> int:
        """The length of a T5 row, 0 where the family has no T5."""
        family = self.model.family
        own = min((part.longest_row for part in self.model.text if part.longest_row is not None), default=None)
        default, most = T5_TOKENS.get(family, (0, 0)) if own is None else (own, own)
        least = max((-reader.tokenizer.room(0) for reader in self._readers if reader.is_t5), default=1)
        if request.max_sequence_length is not None and not least <= request.max_sequence_length <= most:
            reason = f"must be between {least} and {most}" if most else f"{self.model.name} has no T5"
            raise InvalidRequest(f"max_sequence_length: {reason}", "max_sequence_length")
        if not request.use_t5 and family not in T5_OPTIONAL:
            reason = f"{self.model.name} can't do without its T5" if most else f"{self.model.name} has no T5"
            raise InvalidRequest(f"use_t5: {reason}", "use_t5")
        skip = request.clip_skip
        if skip is not None and self._max_skip is None:
            raise InvalidRequest(f"clip_skip: {self.model.name} reads no layers of CLIP", "clip_skip")
        if skip is not None and self._max_skip is not None and not 0 <= skip <= self._max_skip:
            raise InvalidRequest(f"clip_skip: must be between 0 and {self._max_skip}", "clip_skip")
        return request.max_sequence_length or default


def _phases(positive: Timeline, negative: Timeline | None) -> tuple[Phase, ...]:
    """Both sides together: a phase begins wherever one does of either. The negative texts are behind the others."""
    if negative is None:
        return tuple(Phase(first, lanes) for first, lanes in positive.phases)
    behind = len(positive.texts)
    phases = []
    for first in sorted({first for line in (positive, negative) for first, _ in line.phases}):
        ((_, mix),) = _at(negative, first)
        moved = tuple((share, behind + index) for share, index in mix)
        phases.append(Phase(first, _at(positive, first), moved))
    return tuple(phases)


def _at(line: Timeline, step: int) -> Lanes:
    return next(lanes for first, lanes in reversed(line.phases) if first <= step)


def _told(drafts: Sequence[Draft]) -> tuple[tuple[Truncation, ...], tuple[TokenCount, ...]]:
    """What was cut, once, and for each field and encoder the tokens of its longest text."""
    truncated: dict[Truncation, None] = {}
    counts: dict[tuple[str, str], TokenCount] = {}
    for draft in drafts:
        for laid in draft.laid:
            if (gone := laid.truncation(draft.field)) is not None:
                truncated.setdefault(gone)
            count, key = laid.count(draft.field), (draft.field, laid.reader.role)
            if key not in counts or count.used + count.cut > counts[key].used + counts[key].cut:
                counts[key] = count
    return tuple(truncated), tuple(counts.values())
