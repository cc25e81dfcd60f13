"""Who calls, what they may do, and how much of it is left."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

API_KEY = re.compile(r"tdm_([a-z2-7]{12})_[A-Za-z0-9_-]{43}")
"""How an API key is written. Its group is the id, which is no secret."""


class Scope(enum.StrEnum):
    """What a caller may do: order images and look after the own jobs; have text encoded; look into and change what all
    share (the embedding cache, the benchmark)."""

    GENERATE = "generate"
    EMBED = "embed"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What one owner may have; None is no bound.

    `requests_per_minute` and `engine_s_per_day` are token buckets of that size, refilled evenly: orders, and predicted
    seconds of a replica. `max_unfinished` bounds the owner's jobs that have not ended.
    """

    requests_per_minute: int | None = None
    engine_s_per_day: float | None = None
    max_unfinished: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sends a request. `owner` is the id of the API key, or what an authenticating proxy calls the tenant, "" where
    nobody is told apart: whose jobs these are, and with whom the queue shares fairly, by `weight`."""

    owner: str = ""
    scopes: frozenset[Scope] = frozenset(Scope)
    weight: float = 1.0
    allowance: Allowance = Allowance()
    salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One bound of an `Allowance` as it stands: `remaining` of `limit`, `reset_s` until all of it is back. `name` is
    the field of the Allowance; `window_s` is None where time brings nothing back."""

    name: str
    limit: int
    remaining: int
    reset_s: float = 0.0
    window_s: int | None = None
