"""A request's text -> what to encode, and the arithmetic on it, for all families.

The plan says what the stock diffusers pipelines do in `encode_prompt`; `families.READS` has the outputs they read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain

from serve.domain import EncodeUnit, Sign, TextRequest, Truncation
from serve.errors import InvalidRequest
from serve.models import ModelFolder, TextPart
from serve.prompts.families import (
    LOWERED,
    READS,
    T5_OPTIONAL,
    T5_TOKENS,
    UNPADDED,
    VECTORS,
    ZERO_FILLED,
    skipped,
    time_ids,
)
from serve.prompts.grammar import parse
from serve.prompts.rows import TextRow, lay_out, lowered
from serve.prompts.tokenizers import PromptTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One text encoder of a model, as a planner sees it.

    `fingerprint` and `name` are the served encoder's; `projection` is the id of this model's own text projection.
    """

    fingerprint: str
    name: str
    part: TextPart
    projection: str | None = None


@dataclass(frozen=True, slots=True)
class UnitRead:
    """One output of the encoder in `role`. `weights` has one factor per token of the row, None where nothing is
    weighted and for vectors. `empty` says that the row is that of the empty text."""

    role: str
    unit: EncodeUnit
    weights: tuple[float, ...] | None = None
    empty: bool = False


@dataclass(frozen=True, slots=True)
class SidePlan:
    """One side of the guidance.

    The context is built of `blocks`, one below the other; the outputs of one block lie side by side and are padded
    with zeros to the context's width. `vectors` are joined end to end. `zero`: the side is zeros, in the shape of the
    positive one, and nothing is encoded for it.
    """

    blocks: tuple[tuple[UnitRead, ...], ...] = ()
    vectors: tuple[UnitRead, ...] = ()
    zero: bool = False

    @property
    def reads(self) -> tuple[UnitRead, ...]:
        return (*chain.from_iterable(self.blocks), *self.vectors)

    @property
    def units(self) -> tuple[EncodeUnit, ...]:
        """Every unit that the side needs, once."""
        return tuple(dict.fromkeys(read.unit for read in self.reads))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """Tokens of the text of `field` for one encoder: `used` in its row, of which `unknown` stand for text outside its
    vocabulary, and `cut`."""

    field: str
    role: str
    encoder: str
    used: int
    cut: int
    unknown: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPlan:
    """`negative` is None where no step reads one. `zero_rows` are rows of zeros below the context's blocks, in place of
    a T5 that is left out; a context shorter than `context_tokens` is filled up with such rows. `time_ids` are SDXL's:
    original size, crop, target size; heights before widths. Those of its refiner end with an aesthetic score, another
    one on the negative side."""

    family: str
    context_width: int
    positive: SidePlan
    negative: SidePlan | None = None
    zero_rows: int = 0
    context_tokens: int = 0
    time_ids: tuple[float, ...] | None = None
    negative_time_ids: tuple[float, ...] | None = None
    truncated: tuple[Truncation, ...] = ()
    tokens: tuple[TokenCount, ...] = ()

    @property
    def units(self) -> tuple[EncodeUnit, ...]:
        """Every unit that the plan needs, once, positive first."""
        negative = () if self.negative is None else self.negative.units
        return tuple(dict.fromkeys((*self.positive.units, *negative)))

    @property
    def signs(self) -> Mapping[str, Sign]:
        """Who reads a unit, by its key; the positive side where both do."""
        signs: dict[EncodeUnit, Sign] = {}
        for side, sign in ((self.positive, Sign.POSITIVE), (self.negative, Sign.NEGATIVE)):
            for read in side.reads if side is not None else ():
                signs.setdefault(read.unit, Sign.EMPTY if read.empty else sign)
        return {unit.key: sign for unit, sign in signs.items()}


@dataclass(frozen=True, slots=True)
class _Reader:
    """A role of the model, ready to lay out text. `context` is None for a role of which only vectors are read."""

    role: str
    source: Source
    tokenizer: PromptTokenizer
    context: str | None
    vectors: tuple[str, ...]

    @property
    def is_t5(self) -> bool:
        return self.source.part.kind != "clip"


@dataclass(slots=True)
class _Report:
    """What is said of the text beside the units. Fills while the sides are laid out."""

    truncated: list[Truncation]
    tokens: list[TokenCount]

    def add(self, field: str, reader: _Reader, row: TextRow) -> None:
        name, used, cut = reader.source.name, row.used, row.cut
        if cut:
            gone = Truncation(field=field, encoder=name, tokens=used + cut, limit=used, text=row.rest)
            self.truncated.append(gone)
        count = TokenCount(field=field, role=reader.role, encoder=name, used=used, cut=cut, unknown=row.unknown)
        self.tokens.append(count)


class Planner:
    """Compiles one model's requests. The same request gives the same plan in every process, on every attempt.

    Owns: the model's tokenizers. Safe to share between threads.
    """

    def __init__(self, model: ModelFolder, sources: Mapping[str, Source]) -> None:
        """`sources` by role, one for each of the model's. Raises OperatorError where a tokenizer can't be loaded."""
        self._model = model
        self._readers = tuple(_reader(sources[part.role], READS[model.family][part.role]) for part in model.text)
        clips = [reader for reader in self._readers if reader.context and not reader.is_t5]
        self._max_skip = min((reader.source.part.layers - 1 for reader in clips), default=None)

    def plan(self, request: TextRequest) -> PromptPlan:
        """Raises InvalidRequest that names the field of `request` at fault.

        Clip skip is for the prompt alone, as in the stock pipelines: a negative prompt is read from the default layer.
        """
        t5_tokens = self._check(request)
        has_t5 = request.use_t5 and any(reader.is_t5 for reader in self._readers)
        rows = tuple((reader, reader.source.part.row_tokens or t5_tokens) for reader in self._readers)
        if not has_t5:
            rows = tuple((reader, length) for reader, length in rows if not reader.is_t5)
        report = _Report([], [])
        positive = self._side("prompt", request.prompt, rows, request, report)
        negative = None
        if request.negative_prompt is not None:
            negative = self._side(
                "negative_prompt", request.negative_prompt, rows, replace(request, clip_skip=None), report
            )
        ids, negative_ids = time_ids(self._model.family, request.height, request.width)
        return PromptPlan(
            family=self._model.family,
            context_width=self._model.context_width,
            positive=positive,
            negative=negative,
            zero_rows=0 if has_t5 else t5_tokens,
            context_tokens=t5_tokens if self._model.family in ZERO_FILLED else 0,
            time_ids=ids,
            negative_time_ids=None if negative is None else negative_ids,
            truncated=tuple(report.truncated),
            tokens=tuple(report.tokens),
        )

    def _side(
        self, field: str, text: str, rows: tuple[tuple[_Reader, int], ...], request: TextRequest, report: _Report
    ) -> SidePlan:
        """`rows`: who reads, and the length of each one's row."""
        spans = parse(text, field)
        if not spans and field == "negative_prompt" and self._model.zero_empty_negative:
            return SidePlan(zero=True)
        if self._model.family in LOWERED:
            spans = lowered(spans)
        beside: list[UnitRead] = []
        below: list[UnitRead] = []
        vectors: list[UnitRead] = []
        for reader, length in rows:
            row = lay_out(reader.tokenizer, spans, length, padded=self._model.family not in UNPADDED)
            report.add(field, reader, row)
            empty = row.used == 0
            if reader.context is not None:
                output = reader.context if reader.is_t5 else skipped(reader.context, request.clip_skip)
                unit = EncodeUnit(reader.source.fingerprint, row.token_ids, output, request.salt)
                (below if reader.is_t5 else beside).append(UnitRead(reader.role, unit, row.weights, empty))
            for output in reader.vectors:
                unit = EncodeUnit(reader.source.fingerprint, row.token_ids, output, request.salt)
                vectors.append(UnitRead(reader.role, unit, None, empty))
        return SidePlan(tuple(tuple(block) for block in (beside, below) if block), tuple(vectors))

    def _check(self, request: TextRequest) -> int:
        """The length of a T5 row, 0 where the family has no T5."""
        family = self._model.family
        own = min((part.longest_row for part in self._model.text if part.longest_row is not None), default=None)
        default, most = T5_TOKENS.get(family, (0, 0)) if own is None else (own, own)
        least = max((-reader.tokenizer.room(0) for reader in self._readers if reader.is_t5), default=1)
        if request.max_sequence_length is not None and not least <= request.max_sequence_length <= most:
            reason = f"must be between {least} and {most}" if most else f"{self._model.name} has no T5"
            raise InvalidRequest(f"max_sequence_length: {reason}", "max_sequence_length")
        if not request.use_t5 and family not in T5_OPTIONAL:
            reason = f"{self._model.name} can't do without its T5" if most else f"{self._model.name} has no T5"
            raise InvalidRequest(f"use_t5: {reason}", "use_t5")
        skip = request.clip_skip
        if skip is not None and self._max_skip is None:
            raise InvalidRequest(f"clip_skip: {self._model.name} reads no layers of CLIP", "clip_skip")
        if skip is not None and self._max_skip is not None and not 0 <= skip <= self._max_skip:
            raise InvalidRequest(f"clip_skip: must be between 0 and {self._max_skip}", "clip_skip")
        return request.max_sequence_length or default


def _reader(source: Source, reads: tuple[str, ...]) -> _Reader:
    context = next((output for output in reads if output not in VECTORS), None)
    vectors = tuple(
        f"projected:{source.projection}" if output == "projected" else output for output in reads if output in VECTORS
    )
    return _Reader(source.part.role, source, PromptTokenizer(source.part), context, vectors)
