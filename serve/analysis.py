"""What a prompt comes to, without encoding anything: tokens and rows of each encoder, the texts of every step, the
units that this takes and where they are kept, and advice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from serve.domain.conditioning import Mix
from serve.domain.text import FIRST_CONCEPT_ID, EncodeUnit, Note, Sign, TextRequest, Tier, TokenCount, Truncation
from serve.prompts.advice import advice_on, notes_on
from serve.prompts.ast import Break, Concept, Text, Weighted, Word
from serve.prompts.plan import Planner, PromptPlan, TextPlan, UnitRead
from serve.prompts.timeline import Span
from serve.prompts.wanted import WeightedRow
from serve.prompts.written import written


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """`text` is what it stands for, with the space behind (CLIP) or before it (T5). Of a `concept`, a learned vector,
    it is the name."""

    id: int
    text: str
    weight: float
    unknown: bool
    concept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOfTokens:
    """A row as an encoder reads it, without begin, end and padding. `unit` is the key of what is kept of it."""

    unit: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextReading:
    """One text as one encoder reads it. `text` is its index among the texts of the schedule."""

    text: int
    field: str
    role: str
    encoder: str
    rows: tuple[RowOfTokens, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """So much of text number `text`."""

    text: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A noise prediction: its weight in the guidance, and the mix that it reads."""

    weight: float
    mix: tuple[Share, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What the steps from `first` to `last` read. `negative` is None where no step reads one."""

    first: int
    last: int
    positive: tuple[Lane, ...]
    negative: tuple[Share, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedText:
    """A text of the schedule in words, as A1111's syntax has them."""

    field: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPlace:
    """`tier` says where it could be had from now; `encoded` costs a forward pass."""

    key: str
    encoder: str
    output: str
    sign: Sign
    tier: Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """`request` is complete: templates are filled in, choices are made. `template` and `arm` say where it came from."""

    family: str
    request: TextRequest
    template: str | None
    arm: str | None
    composed: int
    tokens: tuple[TokenCount, ...]
    truncated: tuple[Truncation, ...]
    texts: tuple[PlannedText, ...]
    readings: tuple[TextReading, ...]
    schedule: tuple[Moment, ...]
    units: tuple[UnitPlace, ...]
    notes: tuple[Note, ...]
    advice: tuple[Note, ...]


def analysis(
    request: TextRequest,
    planner: Planner,
    plan: PromptPlan,
    tiers: Mapping[str, Tier],
    *,
    guided: bool,
    template: str | None = None,
    arm: str | None = None,
) -> Analysis:
    """`plan` is the request's, `tiers` say by key where each of its units is. `guided`: steps read the negative
    prompt."""
    return Analysis(
        family=plan.family,
        request=request,
        template=template,
        arm=arm,
        composed=plan.composed,
        tokens=plan.tokens,
        truncated=plan.truncated,
        texts=tuple(PlannedText(field=text.field, text=words_of(text)) for text in plan.texts),
        readings=tuple(reading for at, text in enumerate(plan.texts) for reading in _readings(at, text, planner)),
        schedule=tuple(_moments(plan, request.num_inference_steps)),
        units=tuple(_places(plan, planner, tiers)),
        notes=notes_on(request),
        advice=advice_on(request, plan, planner.tokenizers, guided=guided),
    )


def words_of(text: TextPlan) -> str:
    """In A1111's syntax, weights to four digits."""
    words: list[Word] = []
    for each in text.flat:
        if isinstance(each, Break):
            words.append(each)
            continue
        word: Word = Text(each.text) if each.concept is None else Concept(each.concept)
        weight = round(each.weight, 4)
        words.append(word if weight == 1.0 else Weighted((word,), factor=weight))
    return " ".join(written(tuple(words)).split())


def _readings(at: int, text: TextPlan, planner: Planner) -> Iterator[TextReading]:
    """In the order of the roles. Of an encoder that is read for several outputs the rows are told once."""
    rows: dict[str, Sequence[WeightedRow | UnitRead]] = {}
    for column in (column for block in text.blocks for column in block.columns):
        rows.setdefault(column.role, column.text.rows)
    for vector in text.vectors:
        rows.setdefault(vector.rows[0].role, vector.rows)
    names = [each.concept for each in text.flat if isinstance(each, Span) and each.concept is not None]
    for role in (role for role in planner.tokenizers if role in rows):
        yield TextReading(
            text=at,
            field=text.field,
            role=role,
            encoder=planner.sources[role].name,
            rows=tuple(_row(role, row, planner, names) for row in rows[role]),
        )


def _row(role: str, row: WeightedRow | UnitRead, planner: Planner, names: Sequence[str]) -> RowOfTokens:
    tokenizer, ids = planner.tokenizers[role], row.unit.token_ids
    first, last = tokenizer.span(ids)
    concepts = _concepts(role, row.unit, planner, names)
    spelled = tokenizer.spelled(ids[first:last])
    weights = row.weights or (1.0,) * len(ids)
    tokens = (
        Token(
            id=token,
            text=concepts.get(token, text),
            weight=weight,
            unknown=token == tokenizer.unknown,
            concept=token >= FIRST_CONCEPT_ID,
        )
        for token, text, weight in zip(ids[first:last], spelled, weights[first:last], strict=True)
    )
    return RowOfTokens(unit=row.unit.key, tokens=tuple(tokens))


def _concepts(role: str, unit: EncodeUnit, planner: Planner, names: Sequence[str]) -> dict[int, str]:
    """How the learned vectors of a row are told: `<name>` where there is one, else `<name> 1/4`."""
    if not unit.concepts:
        return {}
    known = {}
    for name in names:
        found = planner.concepts.find(name) or {}
        if role in found:
            known[found[role].digest] = (name, found[role].vectors)
    told: dict[int, str] = {}
    for digest in unit.concepts:
        if digest not in known:  # its file was replaced a moment ago
            return {}
        name, vectors = known[digest]
        for at in range(vectors):
            number = f" {at + 1}/{vectors}" if vectors > 1 else ""
            told[FIRST_CONCEPT_ID + len(told)] = f"<{name}>{number} "
    return told


def _moments(plan: PromptPlan, steps: int) -> Iterator[Moment]:
    ends = [phase.first for phase in plan.phases[1:]] + [steps]
    for phase, end in zip(plan.phases, ends, strict=True):
        yield Moment(
            first=phase.first,
            last=end - 1,
            positive=tuple(Lane(weight=weight, mix=_shares(mix)) for weight, mix in phase.positive),
            negative=None if phase.negative is None else _shares(phase.negative),
        )


def _shares(mix: Mix) -> tuple[Share, ...]:
    return tuple(Share(text=text, share=share) for share, text in mix)


def _places(plan: PromptPlan, planner: Planner, tiers: Mapping[str, Tier]) -> Iterator[UnitPlace]:
    names = {source.fingerprint: source.name for source in planner.sources.values()}
    signs = plan.signs
    for unit in plan.units:
        yield UnitPlace(
            key=unit.key,
            encoder=names[unit.encoder],
            output=unit.output,
            sign=signs[unit.key],
            tier=tiers[unit.key],
        )
