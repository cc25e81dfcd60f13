"""How near texts are to one another for an encoder: the cosine of what it makes of them.

A CLIP's text is one vector, the one that it was trained to hold against an image's (`projected`) where the model has
that projection, else the state at the end of the text (`pooled`). A T5 has none: there it is the mean of the states of
the text's tokens. Of a text in several rows the rows count by their tokens. Weights are left out: they are arithmetic
behind the encoder, and say nothing of what it understands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from serve.domain.text import EncodeUnit, Syntax, TextRequest
from serve.encoders.codec import unpack
from serve.errors import InvalidRequest
from serve.prompts.plan import Planner, TextPlan


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a text: its unit, and where its tokens begin and end."""

    unit: EncodeUnit
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """The rows of each text for one encoder, and the output that they are compared by."""

    role: str
    encoder: str
    by: str
    texts: tuple[tuple[Row, ...], ...]

    @property
    def units(self) -> tuple[EncodeUnit, ...]:
        return tuple(row.unit for text in self.texts for row in text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """`by` is what was compared: `projected`, `pooled` or `mean`. `matrix[i][j]` is the cosine of text i and text j."""

    role: str
    encoder: str
    by: str
    matrix: tuple[tuple[float, ...], ...]


def similarity(texts: Sequence[str], planner: Planner, encoder: str | None, salt: str = "") -> tuple[Wanted, ...]:
    """What has to be encoded, for each encoder of the planner's model or for the one of that name or role. Texts are
    plain. Raises InvalidRequest."""
    named = {role: source.name for role, source in planner.sources.items() if role in planner.tokenizers}
    roles = [role for role, name in named.items() if encoder in (None, name, role)]
    if not roles:
        raise InvalidRequest(f"encoder: {planner.model.name} has {', '.join(named.values())}", "encoder")
    plans = [_planned(text, at, planner, salt) for at, text in enumerate(texts)]
    return tuple(_wanted(role, plans, planner) for role in roles)


def compared(wanted: Wanted, embeddings: Mapping[str, bytes]) -> Compared:
    """`embeddings` has the packed value of every unit, by its key. Cosines to six digits."""
    vectors = torch.stack([_vector(wanted.by, text, embeddings) for text in wanted.texts])
    directions = torch.nn.functional.normalize(vectors, dim=1)
    cosines = (directions @ directions.T).clamp(-1, 1).tolist()
    matrix = tuple(tuple(round(cosine, 6) for cosine in row) for row in cosines)
    return Compared(role=wanted.role, encoder=wanted.encoder, by=wanted.by, matrix=matrix)


def _planned(text: str, at: int, planner: Planner, salt: str) -> TextPlan:
    if not text.strip():
        raise InvalidRequest(f"prompts.{at} is empty", f"prompts.{at}")
    request = TextRequest(
        model=planner.model.name, prompt=text, width=1024, height=1024, syntax=Syntax.PLAIN, salt=salt
    )
    (plan,) = planner.plan(request).texts
    return plan


def _wanted(role: str, plans: Sequence[TextPlan], planner: Planner) -> Wanted:
    source, tokenizer = planner.sources[role], planner.tokenizers[role]
    output, by = "hidden", "mean"
    if tokenizer.kind == "clip":
        output, by = (
            ("pooled", "pooled") if source.projection is None else (f"projected:{source.projection}", "projected")
        )
    texts = []
    for at, plan in enumerate(plans):
        rows = [Row(replace(unit, output=output), *tokenizer.span(unit.token_ids)) for unit in _rows(role, plan)]
        if all(row.first == row.last for row in rows):
            raise InvalidRequest(f"prompts.{at}: {source.name} reads nothing in it", f"prompts.{at}")
        texts.append(tuple(rows))
    return Wanted(role, source.name, by, tuple(texts))


def _rows(role: str, plan: TextPlan) -> list[EncodeUnit]:
    """Those of its context, else of its vectors."""
    columns = (column for block in plan.blocks for column in block.columns if column.role == role)
    units = [row.unit for column in columns for row in column.text.rows]
    units = units or [row.unit for vector in plan.vectors for row in vector.rows if row.role == role]
    return list(dict.fromkeys(units))


def _vector(by: str, rows: Sequence[Row], embeddings: Mapping[str, bytes]) -> torch.Tensor:
    """The sum over the rows, each counted by its tokens: its length doesn't matter to a cosine."""
    total = torch.zeros(())
    for row in rows:
        value = unpack(embeddings[row.unit.key]).float()
        total = total + (value[row.first : row.last].sum(0) if by == "mean" else value * (row.last - row.first))
    return total
