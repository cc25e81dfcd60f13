"""The way to the job Redis: scripts by name, errors as ours."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from serve.errors import BackendUnavailable
from serve.jobs import scripts
from serve.settings.stores import JobSettings
from serve.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECT_S, _ANSWER_S = 2.0, 5.0
_RETRY_AFTER_S = 2.0


class Connection:
    """Owns: this process's connections to the job Redis. What fails is BackendUnavailable."""

    def __init__(self, settings: JobSettings, metrics: Metrics, folder: Path = scripts.FOLDER, most: int = 64) -> None:
        """`folder` has the scripts; `most` bounds the connections."""
        if settings.redis_url is None:
            raise ValueError("settings.redis_url must be filled in by now")
        self._metrics = metrics
        self._settings = (
            milliseconds(settings.result_ttl_s),
            milliseconds(settings.dead_letter_ttl_s),
            settings.max_attempts,
        )
        self.redis: Redis = Redis.from_pool(
            # A bounded pool makes a crowd wait for a connection instead of opening one each. A broken connection is
            # replaced once, because a restart of Redis breaks them all; when only the answer was lost, the script
            # runs twice, and each is written to bear that (a second claim's first lease lapses). No `socket_timeout`:
            # redis-py (8.1) then waits with `asyncio.wait_for`, which on Python 3.11 may swallow a cancellation.
            BlockingConnectionPool.from_url(
                settings.redis_url.get_secret_value(),
                max_connections=most,
                timeout=None,
                socket_timeout=None,
                socket_connect_timeout=_CONNECT_S,
                protocol=2,
                retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
            )
        )
        self._scripts = {name: self.redis.register_script(source) for name, source in scripts.sources(folder).items()}

    async def run(self, name: str, *args: str | bytes | int) -> Any:
        """Run a script: one round trip. What it ended is counted here, where each transition passes once."""
        ended, answer = await self.guarded(self._scripts[name](args=(*self._settings, *args)))
        for state, age_ms, dead, template, arm in ended:
            self._metrics.inc("tandem_jobs_total", state=state.decode(), dead="yes" if dead else "no")
            self._metrics.observe("tandem_job_seconds", age_ms / 1000)
            if template:
                named = {"template": template.decode(), "arm": arm.decode()}
                self._metrics.inc("tandem_template_jobs_total", state=state.decode(), **named)
                self._metrics.observe("tandem_template_job_seconds", age_ms / 1000, **named)
        return answer

    async def guarded(self, call: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await call
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            log.warning("the job store does not answer: %s %s", type(error).__name__, error)
            self._metrics.inc("tandem_job_store_errors_total")
        raise BackendUnavailable("the job store does not answer", "jobs.redis_url", _RETRY_AFTER_S)


def milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
