"""The JSON of the text routes: embeddings and their cache. Limits are the service's, as in `schemas.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import ConfigDict

from serve.api.fields import Name, Schema
from serve.api.prompt_schemas import PromptOrder, Written
from serve.domain.text import CacheReport, Note, Tier, TokenCount, Truncation
from serve.encoders.cache import RedisState
from serve.encoders.census import ProcessReport, RedisCensus
from serve.settings.room import Dtype
from serve.text import CacheOverview, Embedded


class TextOrder(PromptOrder):
    """What is read of a text, whatever is wanted of it."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"prompt": "a red circle"}]})

    seed: int = 0
    """Makes the random choices, and chooses the arm of a template."""
    num_inference_steps: int | None = None
    """Steps of the pictures, for a prompt that changes with them; by default what the model is made for."""
    model: Name | None = None
    """A model whose text this server encodes; by default the first."""
    width: int | None = None
    """Pixels; enters SDXL's `add_time_ids` and nothing else. By default the model's own size."""
    height: int | None = None
    """Pixels; enters SDXL's `add_time_ids` and nothing else. By default the model's own size."""
    clip_skip: int | None = None
    """Layers of CLIP to leave out at its end, as in diffusers: 1 is what A1111 calls 2."""
    use_t5: bool = True
    """False leaves out the T5 of a model that can do without it (SD 3): zeros stand in for it."""
    max_sequence_length: int | None = None
    """Tokens of a T5 row; by default the family's."""


class EmbeddingOrder(TextOrder):
    """What to encode. Everything but the prompt has a default; an unknown field is refused."""

    negative_prompt: Written | None = None
    """The other side of the guidance. Without it the answer has no negative tensors; `""` is what the stock pipelines
    take where guidance is on and no negative prompt was given."""
    step: int = 0
    """Whose text to answer with, of a prompt that changes with the steps. One with `AND` has no one embedding."""
    dtype: Dtype = "float32"
    """Precision of the embeddings in the answer."""
    output: Literal["safetensors", "report"] = "safetensors"
    """`report` answers with JSON about the embeddings and leaves them in the cache."""


class EmbeddingReport(Schema):
    """How the embeddings of one text came about."""

    model: str
    family: str
    encoders: tuple[str, ...]
    """The text encoders of the model, as they are served."""
    template: str | None
    arm: str | None
    """Which of the template's texts it is."""
    tokens: tuple[TokenCount, ...]
    """Tokens of the text by field and encoder, and the rows (`chunks`) that they take; `unknown` ones, among those
    used, stand for text that is in no vocabulary."""
    truncated: tuple[Truncation, ...]
    """Text that did not fit into an encoder's row and was left out."""
    notes: tuple[Note, ...]
    """What of the text was read otherwise than it was written."""
    cache: CacheReport
    """Where the embeddings came from."""
    tensors: dict[str, tuple[int, ...]]
    """The shape of each tensor by its name."""

    @classmethod
    def of(cls, embedded: Embedded, tensors: Mapping[str, tuple[int, ...]]) -> EmbeddingReport:
        same = {name: getattr(embedded, name) for name in cls.model_fields if name != "tensors"}
        return cls(**same, tensors=dict(tensors))


class MemoryView(Schema):
    """Embeddings in the memory of one or more processes."""

    entries: int
    bytes: int
    capacity: int
    """Most bytes that they may take."""
    in_flight: int
    """Units that are being looked up or encoded."""
    hits: CacheReport
    """Units answered since the start, by where they were. A unit that one process asks another for counts in both."""
    hit_rate: float | None
    """Share of those that needed no forward pass, 0 to 1; null before the first."""


class ProcessView(MemoryView):
    """One process. `place` is its kind, `name` the encoder or the replica."""

    place: str
    name: str
    redis: RedisState
    """`away` while the process leaves Redis alone after a failure, `off` where it uses none."""

    @classmethod
    def of(cls, report: ProcessReport) -> ProcessView:
        return cls(
            **{name: getattr(report, name) for name in cls.model_fields if name != "hit_rate"},
            hit_rate=_rate(report.hits),
        )


class PlaceView(MemoryView):
    """All processes of one kind together."""

    processes: int

    @classmethod
    def of(cls, reports: Sequence[ProcessReport]) -> PlaceView:
        hits = CacheReport(**{tier: sum(getattr(report.hits, tier) for report in reports) for tier in Tier})
        return cls(
            processes=len(reports),
            entries=sum(report.entries for report in reports),
            bytes=sum(report.bytes for report in reports),
            capacity=sum(report.capacity for report in reports),
            in_flight=sum(report.in_flight for report in reports),
            hits=hits,
            hit_rate=_rate(hits),
        )


class CacheView(Schema):
    """The embedding cache: Redis, which all processes share, and what each has in its own memory."""

    redis: RedisCensus | None
    """The cache Redis as it counts itself (keys, bytes, look-ups of keys, evictions; `max_bytes` 0 is no bound); null
    where none answers."""
    redis_detail: str
    """`up`, or why `redis` is null. Then the process that answers is the only one below: the others report to Redis."""
    places: dict[str, PlaceView]
    processes: tuple[ProcessView, ...]

    @classmethod
    def of(cls, overview: CacheOverview) -> CacheView:
        by_place: dict[str, list[ProcessReport]] = {}
        for report in overview.processes:
            by_place.setdefault(report.place, []).append(report)
        return cls(
            redis=overview.redis,
            redis_detail=overview.detail,
            places={place: PlaceView.of(reports) for place, reports in by_place.items()},
            processes=tuple(map(ProcessView.of, overview.processes)),
        )


def _rate(hits: CacheReport) -> float | None:
    asked = hits.memory + hits.redis + hits.encoded
    return (hits.memory + hits.redis) / asked if asked else None


class Cleared(Schema):
    removed: int
    """Embeddings that Redis had."""
