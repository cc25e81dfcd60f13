"""The JSON of what is said about prompts: what one comes to, and how near several are to one another."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from serve.analysis import Analysis, Moment, PlannedText, TextReading, UnitPlace
from serve.api.fields import FiniteNumber, Name, Schema, Text
from serve.api.text_schemas import TextOrder
from serve.domain.text import LongPrompt, Note, Syntax, TokenCount, Truncation, Weighting
from serve.encoders.similarity import Compared

MOST_COMPARED = 16


class AnalysisOrder(TextOrder):
    """A prompt to look at. Everything but it has a default; an unknown field is refused."""

    guidance_scale: FiniteNumber | None = None
    """Says whether a negative prompt is read; by default what the model is made for."""
    true_cfg_scale: FiniteNumber | None = None
    """The same of a model that reads `guidance_scale` as an input (FLUX)."""


class AnalysisReport(Schema):
    """What a prompt comes to. Nothing was encoded, and nothing counted."""

    model: str
    family: str
    prompt: str
    """In words, with variables filled in and choices made."""
    negative_prompt: str | None
    prompt_syntax: Syntax
    prompt_weighting: Weighting
    long_prompt: LongPrompt
    num_inference_steps: int
    template: str | None
    arm: str | None
    """Which of the template's texts it is."""
    tokens: tuple[TokenCount, ...]
    """Tokens by field and encoder, and the rows (`chunks`) that they take."""
    truncated: tuple[Truncation, ...]
    """Text that does not fit."""
    texts: tuple[PlannedText, ...]
    """The different texts that the steps read, as A1111's syntax has them; `schedule` and `readings` name them by their
    places here."""
    readings: tuple[TextReading, ...]
    """Each text as each encoder reads it: rows of tokens, and the weight of each token."""
    composed: int
    """Noise predictions of a step beside the negative one's: as many as `AND` has parts."""
    schedule: tuple[Moment, ...]
    """What the steps from `first` to `last`, both included, read."""
    units: tuple[UnitPlace, ...]
    """What the encoders are asked for, and where each can be had from now: `memory` (of the process that answers),
    `redis`, or `encoded`: it costs a forward pass."""
    notes: tuple[Note, ...]
    """What is read otherwise than it was written."""
    advice: tuple[Note, ...]
    """What is allowed, and rarely wanted."""

    @classmethod
    def of(cls, found: Analysis) -> AnalysisReport:
        request = found.request
        asked = {
            "model": request.model,
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "prompt_syntax": request.syntax,
            "prompt_weighting": request.weighting,
            "long_prompt": request.long_prompt,
            "num_inference_steps": request.num_inference_steps,
        }
        return cls(**asked, **{name: getattr(found, name) for name in cls.model_fields if name not in asked})


class SimilarityOrder(Schema):
    """Texts to hold against one another."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"prompts": ["a red circle", "a round red thing"]}]},
    )

    prompts: Annotated[list[Text], Field(min_length=2, max_length=MOST_COMPARED)]
    """Plain texts, brackets and all."""
    model: Name | None = None
    """A model whose text this server encodes; by default the first."""
    encoder: Name | None = None
    """One of its encoders, by name or role; by default each."""


class SimilarityReport(Schema):
    """By encoder, the cosine of each two texts. Encoders differ in what they call near: compare within one matrix."""

    model: str
    family: str
    compared: tuple[Compared, ...]
    """`matrix[i][j]` is that of texts i and j. `by` is what was compared: `projected` (what a CLIP was trained to hold
    against images), `pooled` (its state at the end of the text), or `mean` (of a T5's states)."""
