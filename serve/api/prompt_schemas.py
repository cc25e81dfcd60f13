"""The JSON of prompts, as all orders have it: in words or in pieces, over the steps, by a template of the server's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator, TypeAdapter
from pydantic_core import PydanticCustomError

from serve.api.fields import FiniteNumber, Name, Schema, Text
from serve.domain.text import LongPrompt, Syntax, Weighting

MOST_PIECES = 64
"""Of one list, as many as a request may have texts."""
_LAST = 1_000_000
"""Beyond every step that there can be."""


class Piece(Schema):
    """A whole prompt and its weight beside the others."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: Text
    """A prompt, with all that it may have."""
    weight: FiniteNumber = 1.0
    """Its share. Weights that don't add up to 1 are brought to it, and `notes` say so."""


_Pieces = Annotated[list[Piece], Field(min_length=1, max_length=MOST_PIECES)]
_text: Callable[..., str] = TypeAdapter(Text).validate_python
_pieces: Callable[..., list[Piece]] = TypeAdapter(_Pieces).validate_python


def _written(value: Any) -> str | list[Piece]:
    """By its kind: a union would tell what is wrong with it as each of them."""
    if isinstance(value, list):
        return _pieces(value, strict=True)
    if not isinstance(value, str):
        raise PydanticCustomError("prompt_type", "must be text, or a list of {text, weight}")
    return _text(value, strict=True)


def _moment(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LAST:
        raise PydanticCustomError("moment", "must be a step, or a share of the steps below 1")
    return value


def _as_json(value: str | list[Piece]) -> Any:
    return value if isinstance(value, str) else [piece.model_dump() for piece in value]


Written = Annotated[
    str | list[Piece], PlainValidator(_written, json_schema_input_type=Text | _Pieces), PlainSerializer(_as_json)
]
"""A prompt in words, or several that are blended."""
Moment = Annotated[int | float, PlainValidator(_moment, json_schema_input_type=float)]
"""Of the denoising, as `[from:to:when]` has it: what is written with a point is a share of the steps."""


class Entry(Schema):
    """From a step until before another the prompt is this one."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    begin: Annotated[Moment, Field(alias="from")]
    """A step (`10`), or a share of the steps (`0.25`)."""
    end: Annotated[Moment | None, Field(alias="to")] = None
    """The first step that it is not for, written like `from`; by default it lasts until the end."""
    prompt: Written
    ramp: bool = False
    """Go there in equal parts from the prompt before, and stay."""


class PromptOrder(Schema):
    """What the prompts are. Every order that has text begins with these fields."""

    prompt: Written | None = None
    """What the picture shows, in words, or several prompts that are blended: `[{"text": "a sunset", "weight": 0.7},
    {"text": "an ocean", "weight": 0.3}]`. Words have A1111's syntax: weights `(red:1.3)`, `(red)`, `[red]`; changes
    between steps `[red:blue:0.5]`, `[red|blue]`, `[red:blue:5-15]`; `BREAK`, `AND`, `<concept>`; choices by the seed
    `{red|blue}`. With a `template` it is what stands for `{prompt}` there."""
    negative_prompt: Written | None = None
    """What it must not show."""
    schedule: Annotated[list[Entry], Field(max_length=MOST_PIECES)] | None = None
    """Other prompts for some of the steps: `[{"from": 10, "to": 20, "prompt": "an ocean", "ramp": true}]`. In all the
    others it is `prompt`."""
    prompt_syntax: Annotated[Syntax, Field(strict=False)] | None = None
    """`a1111`, `compel` (`red++`, `(red)1.3`, `("a", "b").blend(1, 1)`) or `plain`, where brackets are text. By default
    the template's, or `a1111`."""
    prompt_weighting: Annotated[Weighting, Field(strict=False)] = Weighting.A1111
    """What a weight does: `a1111` multiplies and restores the mean, `compel` goes away from what the text would be
    without the words, `multiply` multiplies."""
    long_prompt: Annotated[LongPrompt, Field(strict=False)] = LongPrompt.CHUNK
    """What becomes of a text that is longer than an encoder's row: `chunk` (several rows), `window` (overlapping ones),
    `hierarchical` (their mean), `head` and `tail` (one end of it), `error`."""
    variables: Annotated[dict[Name, Text], Field(max_length=MOST_PIECES)] | None = None
    """What stands for `{name}` in the texts."""
    template: Name | None = None
    """A prompt of the server's (`prompts.templates`)."""
    arm: Name | None = None
    """Which of the template's texts to take; by default the seed says."""
