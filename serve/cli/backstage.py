"""Behind the scenes: the way of an operator's command to the jobs and keys, past the HTTP API."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cached_property

from pydantic import SecretStr

from serve.embedded import EmbeddedRedis, check_redis, ever_used, running_url
from serve.errors import OperatorError
from serve.jobs.store import JobStore
from serve.keys import KeyStore
from serve.origins import shown
from serve.results.store import ResultStore, open_store
from serve.settings.stores import JobSettings
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics, Metrics

_WAIT_S = 10.0
"""How long a server that is just starting, or another command, may keep the jobs' folder to itself."""
_POLL_S = 0.05


@dataclass(frozen=True)
class Backstage:
    """What a command may reach. `place` says to people where the jobs and keys lie: a folder, or a Redis' address."""

    settings: Settings
    jobs: JobStore
    keys: KeyStore
    place: str

    @cached_property
    def results(self) -> ResultStore:
        return open_store(self.settings.results, self.settings.data_dir.absolute())


@contextlib.asynccontextmanager
async def backstage(settings: Settings, *, begin: bool = False) -> AsyncIterator[Backstage]:
    """The stores of a server with these settings, whether it is up or not.

    They lie in the Redis of `jobs.redis_url`; without one in that of the `tandem up` which runs on the same data_dir;
    where none runs, a Redis is started on its files until the command is done. A data_dir without such files is
    refused, and left as it is, unless the command is one to `begin` with. Jobs are treated by the rules that a server
    has left there, whatever these settings say of them. Raises OperatorError, BackendUnavailable.
    """
    async with contextlib.AsyncExitStack() as stack:
        url = await _reach(settings, stack, begin)
        place = str(settings.data_dir.absolute()) if settings.jobs.redis_url is None else shown(settings.jobs.redis_url)
        metrics = InProcessMetrics()
        rules = await _rules(settings.jobs.model_copy(update={"redis_url": SecretStr(url)}), metrics)
        jobs = JobStore(rules, metrics)
        stack.push_async_callback(jobs.close)
        keys = KeyStore(rules, metrics)
        stack.push_async_callback(keys.close)
        yield Backstage(settings.model_copy(update={"jobs": rules}), jobs, keys, place)


async def _rules(settings: JobSettings, metrics: Metrics) -> JobSettings:
    store = JobStore(settings, metrics)
    try:
        return await store.told_rules()
    finally:
        await store.close()


async def _reach(settings: Settings, stack: contextlib.AsyncExitStack, begin: bool) -> str:
    """The URL of the job Redis, which answers; `stack` ends what was started for it."""
    given = settings.jobs.redis_url
    if given is not None:
        check_redis(given.get_secret_value(), "jobs.redis_url")
        return given.get_secret_value()
    own = EmbeddedRedis(settings.data_dir, "jobs", told=False)  # what ends in a moment is nothing to rely on
    stack.callback(own.stop)
    deadline = time.monotonic() + _WAIT_S
    while True:
        url = running_url(settings.data_dir)
        if url is not None:
            return url
        if not begin and not ever_used(settings.data_dir):
            where = settings.data_dir.absolute()
            raise OperatorError(f"data_dir: nothing there: no server has kept jobs or keys in {where}", "data_dir")
        if own.try_start():
            return own.url
        if time.monotonic() > deadline:
            raise OperatorError(f"data_dir: the server that uses {own.folder} does not answer", "data_dir")
        await asyncio.sleep(_POLL_S)
