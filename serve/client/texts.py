"""What the server says of texts, and the texts that it makes, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.domain.text import CacheReport, LongPrompt, Note, Sign, Syntax, Tier, TokenCount, Truncation, Weighting


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token of a row, its weight, and whether it is outside the vocabulary or a vector of a learned concept."""

    id: int
    text: str
    weight: float
    unknown: bool
    concept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of tokens of an encoder; `unit` is the key of what is kept of it."""

    unit: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Text number `text` as one encoder reads it."""

    text: int
    field: str
    role: str
    encoder: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """So much of text number `text`."""

    text: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A noise prediction: its weight, and the mix of texts that it reads."""

    weight: float
    mix: tuple[Share, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What the steps from `first` to `last` read."""

    first: int
    last: int
    positive: tuple[Lane, ...]
    negative: tuple[Share, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedText:
    """A text that some steps read."""

    field: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What an encoder is asked for, and where it can be had from."""

    key: str
    encoder: str
    output: str
    sign: Sign
    tier: Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What a prompt comes to."""

    model: str
    family: str
    prompt: str
    negative_prompt: str | None
    prompt_syntax: Syntax
    prompt_weighting: Weighting
    long_prompt: LongPrompt
    num_inference_steps: int
    template: str | None
    arm: str | None
    tokens: tuple[TokenCount, ...]
    truncated: tuple[Truncation, ...]
    texts: tuple[PlannedText, ...]
    readings: tuple[Reading, ...]
    composed: int
    schedule: tuple[Moment, ...]
    units: tuple[Unit, ...]
    notes: tuple[Note, ...]
    advice: tuple[Note, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """`matrix[i][j]` is the cosine of texts i and j for one encoder, of `by`: `projected`, `pooled` or `mean`."""

    role: str
    encoder: str
    by: str
    matrix: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """How the embeddings of a text came about; `tensors` has the shape of each by its name."""

    model: str
    family: str
    encoders: tuple[str, ...] = ()
    template: str | None = None
    arm: str | None = None
    tokens: tuple[TokenCount, ...] = ()
    truncated: tuple[Truncation, ...] = ()
    notes: tuple[Note, ...] = ()
    cache: CacheReport
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caption:
    """What a model says of a picture; `tokens` are those of the caption."""

    model: str
    caption: str
    tokens: int
