"""What a planner hands on: the units to encode, and how the texts that the denoiser reads are put together of them.

A text is blocks, one below the other; a block is columns, one for each encoder, side by side; a column is rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from serve.domain.conditioning import Phase
from serve.domain.text import EncodeUnit, Sign, TokenCount, Truncation, Weighting
from serve.prompts.flats import Flat
from serve.prompts.wanted import Wanted


@dataclass(frozen=True, slots=True)
class UnitRead:
    """One unit of the encoder in `role`. `weights` has one factor per token of the row, None where nothing is weighted
    and for vectors. `empty` says that the row is that of the empty text."""

    role: str
    unit: EncodeUnit
    weights: tuple[float, ...] | None = None
    empty: bool = False


@dataclass(frozen=True, slots=True)
class Window:
    """A row of overlapping ones: its `tokens` tokens of text, which begin at position `at` of the row, are those from
    `first` on of the whole text."""

    first: int
    at: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Column:
    """One encoder's rows of a text. `fill` says how often the `empty` text's row follows below them.

    `windows`, where there are any, has one for each row: a token that several rows have takes the mean of its
    embeddings in all of them. `shares`, where there are any, has one for each row: the rows' weighted mean stands for
    all of them.
    """

    role: str
    text: Wanted
    windows: tuple[Window, ...] = ()
    shares: tuple[float, ...] = ()
    empty: EncodeUnit | None = None
    fill: int = 0
    blank: bool = False
    """Whether the text has no words."""

    @property
    def reads(self) -> Iterator[UnitRead]:
        for row in self.text.rows:
            yield UnitRead(self.role, row.unit, row.weights, self.blank)
        for unit in self.text.extra:
            yield UnitRead(self.role, unit, None, self.blank or unit == self.text.empty)
        if self.empty is not None and self.fill:
            yield UnitRead(self.role, self.empty, None, True)


@dataclass(frozen=True, slots=True)
class Block:
    """Columns side by side, padded with zeros to the context's width. It takes up `height` tokens of the context, of
    which `top` are zeros above the columns; what is missing below them is zeros too."""

    columns: tuple[Column, ...]
    height: int
    top: int = 0


@dataclass(frozen=True, slots=True)
class Vector:
    """One vector for the whole text: the first row's, or the weighted mean of all rows'."""

    rows: tuple[UnitRead, ...]
    shares: tuple[float, ...] = (1.0,)


@dataclass(frozen=True, slots=True)
class TextPlan:
    """One text of the request's `field`, as the denoiser reads it: `blocks` one below the other, and `vectors` end to
    end. `slot` is its place in `.and()`: a text has vectors in the first place alone, others' are zeros.

    `zero`: the text is zeros, in the shape of the others, and nothing is encoded for it.
    """

    field: str
    flat: Flat
    blocks: tuple[Block, ...] = ()
    vectors: tuple[Vector, ...] = ()
    slot: int = 0
    zero: bool = False

    @property
    def reads(self) -> tuple[UnitRead, ...]:
        columns = (column for block in self.blocks for column in block.columns)
        rows = (row for vector in self.vectors for row in vector.rows)
        return (*chain.from_iterable(column.reads for column in columns), *rows)

    @property
    def units(self) -> tuple[EncodeUnit, ...]:
        """Every unit that the text needs, once."""
        return tuple(dict.fromkeys(read.unit for read in self.reads))


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPlan:
    """`texts` are the prompt's and, where there is guidance, the negative one's behind them; `phases` say which of them
    each step reads. All texts have one shape, but for families that hide a T5's padding: there those that are mixed.

    `zero_rows` are rows of zeros below the context's blocks, in place of a T5 that is left out; a context shorter than
    `context_tokens` is filled up with such rows. `time_ids` are SDXL's: original size, crop, target size; heights
    before widths. Those of its refiner end with an aesthetic score, another one on the negative side.
    """

    family: str
    context_width: int
    texts: tuple[TextPlan, ...]
    phases: tuple[Phase, ...]
    weighting: Weighting = Weighting.A1111
    zero_rows: int = 0
    context_tokens: int = 0
    time_ids: tuple[float, ...] | None = None
    negative_time_ids: tuple[float, ...] | None = None
    truncated: tuple[Truncation, ...] = ()
    tokens: tuple[TokenCount, ...] = ()

    @property
    def composed(self) -> int:
        """Noise predictions beside the negative one's."""
        return len(self.phases[0].positive)

    @property
    def guided(self) -> bool:
        """Whether there is a negative text."""
        return self.phases[0].negative is not None

    @property
    def reads(self) -> tuple[UnitRead, ...]:
        return tuple(chain.from_iterable(text.reads for text in self.texts))

    @property
    def units(self) -> tuple[EncodeUnit, ...]:
        """Every unit that the plan needs, once, the prompt's first."""
        return tuple(dict.fromkeys(read.unit for read in self.reads))

    @property
    def signs(self) -> Mapping[str, Sign]:
        """Who reads a unit, by its key; the prompt where both do."""
        signs: dict[EncodeUnit, Sign] = {}
        for text in self.texts:
            sign = Sign.NEGATIVE if text.field == "negative_prompt" else Sign.POSITIVE
            for read in text.reads:
                signs.setdefault(read.unit, Sign.EMPTY if read.empty else sign)
        return {unit.key: sign for unit, sign in signs.items()}

    def of(self, field: str) -> tuple[TextPlan, ...]:
        """The texts of `prompt` or `negative_prompt`."""
        return tuple(text for text in self.texts if text.field == field)
