"""One text encoder of a model, as a planner sees it: how it reads a text, and what a plan makes of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from serve.domain.text import EncodeUnit, LongPrompt, TextRequest, TokenCount, Truncation
from serve.models import TextPart
from serve.prompts.chunks import cut, part
from serve.prompts.concepts import ConceptRef
from serve.prompts.families import VECTORS, skipped
from serve.prompts.flats import Flat
from serve.prompts.planned import Column, UnitRead, Vector, Window
from serve.prompts.rows import Reading, TextRow, lay_out, read
from serve.prompts.tokenizers import PromptTokenizer
from serve.prompts.wanted import WeightedRow, wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One text encoder of a model.

    `fingerprint` and `name` are the served encoder's; `projection` is the id of this model's own text projection.
    """

    fingerprint: str
    name: str
    part: TextPart
    projection: str | None = None


@dataclass(frozen=True, slots=True)
class Reader:
    """A role of the model, ready to lay out text. `context` is None for a role of which only vectors are read; it reads
    one row, whatever is longer is cut but where the client wants all of it."""

    role: str
    source: Source
    tokenizer: PromptTokenizer
    context: str | None
    vectors: tuple[str, ...]

    @classmethod
    def of(cls, source: Source, reads: tuple[str, ...]) -> Reader:
        """`reads` are outputs as `families.READS` names them."""
        context = next((output for output in reads if output not in VECTORS), None)
        vectors = tuple(
            f"projected:{source.projection}" if output == "projected" else output
            for output in reads
            if output in VECTORS
        )
        return cls(source.part.role, source, PromptTokenizer(source.part), context, vectors)

    @property
    def is_t5(self) -> bool:
        return self.source.part.kind != "clip"

    def lay_out(
        self,
        flat: Flat,
        refs: Mapping[str, Mapping[str, ConceptRef]],
        length: int,
        policy: LongPrompt,
        field: str,
        *,
        padded: bool,
    ) -> Laid:
        """`flat` in rows of `length`; `refs` are the vectors of its concepts, by name and role. Raises InvalidRequest
        that names `field` for a text that is too long for the policy."""
        own = {name: by_role.get(self.role) for name, by_role in refs.items()}
        reading = read(self.tokenizer, flat, own, parted=not self.is_t5 and self.context is not None)
        if self.context is None and policy in (LongPrompt.CHUNK, LongPrompt.WINDOW):
            policy = LongPrompt.HEAD
        parts = part(reading.tokens, self.tokenizer.room(length), policy, field, self.source.name)
        rows = lay_out(self.tokenizer, reading, parts, length, padded=padded)
        return Laid(self, reading, rows, policy, length, padded)


@dataclass(frozen=True, slots=True)
class Laid:
    """A text in the rows of one encoder. `length` is a whole row's."""

    reader: Reader
    reading: Reading
    rows: tuple[TextRow, ...]
    policy: LongPrompt
    length: int
    padded: bool

    @property
    def height(self) -> int:
        """Tokens of the context that it takes up."""
        lengths = [len(row.token_ids) for row in self.rows]
        return max(lengths) if self.policy is LongPrompt.HIERARCHICAL else sum(lengths)

    def column(self, request: TextRequest, field: str, height: int) -> Column:
        """The context's part, filled up to `height` with rows of the empty text where rows are padded."""
        assert self.reader.context is not None
        skip = request.clip_skip if field == "prompt" and not self.reader.is_t5 else None
        output = skipped(self.reader.context, skip)
        rows = [WeightedRow(self._unit(row, output, request.salt), row.weights, row.fragments) for row in self.rows]
        empty = self._empty(output, request.salt)
        several = len(rows) > 1
        return Column(
            role=self.reader.role,
            text=wanted(request.weighting, rows, empty, field),
            windows=self._windows() if several and self.policy is LongPrompt.WINDOW else (),
            shares=self._shares() if several and self.policy is LongPrompt.HIERARCHICAL else (),
            empty=empty,
            fill=(height - self.height) // self.length if self.padded else 0,
            blank=not self.reading.tokens.ids,
        )

    def vector(self, output: str, salt: str) -> Vector:
        """`output`, one vector, of the first row; of all rows where they stand for the text together."""
        together = self.policy is LongPrompt.HIERARCHICAL
        rows, shares = (self.rows, self._shares()) if together else (self.rows[:1], (1.0,))
        blank = not self.reading.tokens.ids
        reads = (UnitRead(self.reader.role, self._unit(row, output, salt), None, blank) for row in rows)
        return Vector(tuple(reads), shares)

    def count(self, field: str) -> TokenCount:
        gone, _ = self._cut()
        return TokenCount(
            field=field,
            role=self.reader.role,
            encoder=self.reader.source.name,
            used=len(self.reading.tokens.ids) - gone,
            cut=gone,
            unknown=self._unknown(),
            chunks=len(self.rows),
        )

    def truncation(self, field: str) -> Truncation | None:
        """None where nothing was cut."""
        gone, rest = self._cut()
        tokens = len(self.reading.tokens.ids)
        if not gone:
            return None
        return Truncation(field=field, encoder=self.reader.source.name, tokens=tokens, limit=tokens - gone, text=rest)

    def _unit(self, row: TextRow, output: str, salt: str) -> EncodeUnit:
        return EncodeUnit(self.reader.source.fingerprint, row.token_ids, output, salt, row.concepts)

    def _empty(self, output: str, salt: str) -> EncodeUnit:
        """The empty text's row, as long as a row can be. Where padding is hidden from what is read, here too."""
        ids = self.reader.tokenizer.row((), self.length)
        around = self.length - self.reader.tokenizer.room(self.length)
        hidden = () if self.padded else tuple(range(around, self.length))
        return EncodeUnit(self.reader.source.fingerprint, ids, output, salt, (), hidden)

    def _windows(self) -> tuple[Window, ...]:
        return tuple(Window(row.tokens.start, row.at, len(row.tokens)) for row in self.rows)

    def _shares(self) -> tuple[float, ...]:
        total = sum(len(row.tokens) for row in self.rows)
        return tuple(len(row.tokens) / total for row in self.rows) if total else (1.0,)

    def _cut(self) -> tuple[int, str]:
        return cut(self.reading.tokens, [row.tokens for row in self.rows])

    def _unknown(self) -> int:
        """Of the tokens that are read, those that stand for text outside the vocabulary."""
        unknown, ids = self.reader.tokenizer.unknown, self.reading.tokens.ids
        if unknown is None or unknown not in ids:
            return 0
        return sum(ids[at] == unknown for at in {at for row in self.rows for at in row.tokens})
