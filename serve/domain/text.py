"""Texts: as they are ordered, the units that encoders read, and what is told of both."""

from __future__ import annotations

import enum
import hashlib
import struct
from dataclasses import dataclass


class Tier(enum.StrEnum):
    """Where a text unit's embedding came from: this process's memory, Redis, or a forward pass of the encoder."""

    MEMORY = "memory"
    REDIS = "redis"
    ENCODED = "encoded"


class Syntax(enum.StrEnum):
    """What a prompt is written in. `plain` has no syntax: brackets are text."""

    A1111 = "a1111"
    COMPEL = "compel"
    PLAIN = "plain"


class Weighting(enum.StrEnum):
    """What a weight does to the embedding of its tokens: `serve.encoders.weighting`."""

    A1111 = "a1111"
    COMPEL = "compel"
    MULTIPLY = "multiply"


class LongPrompt(enum.StrEnum):
    """What becomes of a text that is longer than an encoder's row: `serve.prompts.chunks`."""

    CHUNK = "chunk"
    WINDOW = "window"
    HEAD = "head"
    TAIL = "tail"
    HIERARCHICAL = "hierarchical"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """What a model's text encoders are asked for. `negative_prompt` is None where nothing is to be encoded for it.

    `width` and `height` (pixels) only enter SDXL's time ids. `clip_skip` n reads CLIP n layers earlier than the
    family's default, as in diffusers. `use_t5` False leaves the T5 of a model that can do without it (SD 3) unread.
    `max_sequence_length` is the length of a T5 row, by default the family's. `salt` enters the cache keys.
    """

    model: str
    prompt: str
    negative_prompt: str | None = None
    width: int
    height: int
    num_inference_steps: int = 1
    syntax: Syntax = Syntax.A1111
    weighting: Weighting = Weighting.A1111
    long_prompt: LongPrompt = LongPrompt.CHUNK
    clip_skip: int | None = None
    use_t5: bool = True
    max_sequence_length: int | None = None
    salt: str = ""

    @property
    def characters(self) -> int:
        return len(self.prompt) + len(self.negative_prompt or "")


UNIT_SCHEME = "tandem.unit.3"
"""Version of the recipe behind `EncodeUnit.key`. Another recipe needs another name: Redis outlives a release."""


FIRST_CONCEPT_ID = 1 << 30
"""Token ids from here on are no words of a vocabulary but learned vectors."""


@dataclass(frozen=True, slots=True)
class EncodeUnit:
    """One forward of one fixed-length row of token ids through one text encoder: what is batched, cached and shared.

    `encoder` is the fingerprint of the encoder's weights and of the precision they run in. `output` names what is read
    out of the forward:

        hidden          last hidden state after the final norm, (len(token_ids), width)
        skip:N          hidden state N layers before the last, no final norm; skip:1 is the penultimate
        skip:N:norm     the same after the final norm
        pooled          `hidden` at the first end-of-text token, (width,)
        projected:ID    `pooled` through the text projection ID, (projection width,)

    `salt` keeps tenants' entries apart: no timing tells one of them what another has written.

    `concepts` are digests of learned vectors (textual inversion), in the order in which the row first reads them: the
    token id FIRST_CONCEPT_ID + n is row n of their vectors one below the other. `hidden` are positions of the row that
    no other token looks at (Compel's way to leave words out), in rising order.
    """

    encoder: str
    token_ids: tuple[int, ...]
    output: str = "hidden"
    salt: str = ""
    concepts: tuple[str, ...] = ()
    hidden: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """The cache key, 40 hex digits: equal keys mean equal embeddings, within the dtype's tolerance."""
        concepts, hidden = ",".join(self.concepts), ",".join(map(str, self.hidden))
        head = "\0".join((UNIT_SCHEME, self.encoder, self.output, self.salt, concepts, hidden, ""))
        ids = struct.pack(f"<{len(self.token_ids)}I", *self.token_ids)
        return hashlib.blake2b(head.encode() + ids, digest_size=20).hexdigest()


class Sign(enum.StrEnum):
    """Which side of the guidance reads a unit. An empty text is its own sign: everybody shares it, and it would
    pass for a hit rate of one half."""

    POSITIVE = "positive"
    NEGATIVE = "negative"
    EMPTY = "empty"


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """Text that did not fit into an encoder's row: `tokens` were written, `limit` were used, `text` was cut."""

    field: str
    encoder: str
    tokens: int
    limit: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """Tokens of the text of `field` for one encoder: `used` in its row or rows (`chunks`), of which `unknown` stand for
    text outside its vocabulary, and `cut`."""

    field: str
    role: str
    encoder: str
    used: int
    cut: int
    unknown: int
    chunks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something that a client should know of a text of theirs. `code` is for programs, `message` for people."""

    field: str
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """How many of the job's text units came from which tier. No unit is counted twice."""

    memory: int = 0
    redis: int = 0
    encoded: int = 0
