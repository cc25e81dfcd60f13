"""A caller's limits as headers, by the IETF's draft-ietf-httpapi-ratelimit-headers-10.

RateLimit-Policy: "requests_per_minute";q=60;qu="requests";w=60
RateLimit: "requests_per_minute";r=59;t=1
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from serve.callers import Limit

UNITS: Mapping[str, str] = {
    "requests_per_minute": "requests",
    "engine_s_per_day": "engine-seconds",
    "max_unfinished": "concurrent-requests",
}
"""What each limit counts. `engine-seconds` is ours: predicted seconds of a replica."""


def headers(limits: Sequence[Limit]) -> dict[str, str]:
    """None where the caller has no limits: an empty field is not allowed."""
    if not limits:
        return {}
    return {"RateLimit-Policy": ", ".join(map(_policy, limits)), "RateLimit": ", ".join(map(_state, limits))}


def _policy(limit: Limit) -> str:
    window = "" if limit.window_s is None else f";w={limit.window_s}"
    return f'"{limit.name}";q={limit.limit};qu="{UNITS[limit.name]}"{window}'


def _state(limit: Limit) -> str:
    reset = "" if limit.window_s is None else f";t={math.ceil(limit.reset_s)}"
    return f'"{limit.name}";r={limit.remaining}{reset}'
