"""One Redis as it is found: what it tells of itself, how fast it answers, and whether it lets us write."""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import redis

from serve.embedded import check_redis, check_redis_url
from serve.errors import OperatorError
from serve.urls import place_of

PINGS, WRITES = 15, 5
_PROBE_MS = 10_000
_WRITE = "return redis.call('set', KEYS[1], 'probe', 'px', ARGV[1])"
"""As a script, because scripts are what the server writes with: a user of Redis may lack the right to run any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """`info` is empty where this Redis does not tell, and `config` lacks what it does not: managed ones forbid it.
    `ping_s` and `write_s` are medians over a connection that is there; `refusal` is its word for why it did not write,
    None where it did. `ahead_s` is how far its clock is ahead of this machine's."""

    setting: str
    place: str
    info: Mapping[str, Any]
    config: Mapping[str, str]
    ping_s: float
    write_s: float
    ahead_s: float
    refusal: str | None

    def told(self, name: str, other: Any = None) -> Any:
        """A line of INFO."""
        return self.info.get(name, other)


def look(url: str, setting: str) -> Look:
    """Raises OperatorError naming `setting` where nothing answers, or not to us."""
    check_redis(url, setting)
    try:
        with check_redis_url(url, setting) as client:
            return _look(client, place_of(url) or "the given URL", setting)
    except redis.RedisError:
        raise OperatorError(f"{setting}: Redis stopped answering while it was looked at", setting) from None


def _look(client: redis.Redis, place: str, setting: str) -> Look:
    info: Mapping[str, Any] = _allowed(client.info) or {}
    config: dict[str, str] = {}
    for name in ("appendfsync", "maxmemory-policy"):  # one by one: Redis 6 knows no more at a time
        config |= _allowed(partial(client.config_get, name)) or {}
    before = time.time()
    seconds, micros = _allowed(client.time) or (0, 0)
    after = time.time()
    write_s, refusal = _written(client)
    return Look(
        setting=setting,
        place=place,
        info=info,
        config=config,
        ping_s=statistics.median(_timed(client.ping) for _ in range(PINGS)),
        write_s=write_s,
        ahead_s=seconds + micros / 1e6 - (before + after) / 2 if seconds else 0.0,
        refusal=refusal,
    )


def _written(client: redis.Redis) -> tuple[float, str | None]:
    """Median seconds of a write by script, and the first word of the refusal where there was one."""
    key = f"tandem:doctor:{secrets.token_hex(8)}"
    try:
        took = [_timed(lambda: client.eval(_WRITE, 1, key, str(_PROBE_MS))) for _ in range(WRITES)]
        client.delete(key)
    except redis.ResponseError as error:
        return 0.0, " ".join(str(error).split()) or "no reason given"
    return statistics.median(took), None


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _allowed(call: Callable[[], Any]) -> Any:
    """None where this user of Redis may not ask."""
    try:
        return call()
    except redis.ResponseError:
        return None
