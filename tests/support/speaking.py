"""The application for tests that are no coroutines: each request runs on an event loop that goes on between them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import redis
from pydantic import SecretStr
from support.obliging import obliging

from serve.settings.front import HttpSettings
from serve.settings.stores import CacheSettings

SOON_S = 20.0


class Speaking:
    """A stand whose orders a worker obliges."""

    def __init__(self, runner: asyncio.Runner, stand: Any, folder: Path) -> None:
        self.run = runner.run
        self.stand = stand
        self.folder = folder

    def send(self, method: str, url: str, **content: Any) -> httpx.Response:
        """As `httpx.Client.request`. TimeoutError."""
        return self.run(asyncio.wait_for(self.stand.client.request(method, url, **content), SOON_S))

    def orders(self) -> float:
        """Jobs that were accepted so far."""
        return float(self.stand.metrics.value("tandem_stage_seconds", stage="admission"))


@contextlib.contextmanager
def speaking_on(
    stand_on: Callable[..., AbstractAsyncContextManager[Any]], redis_url: str, folder: Path, **settings: Any
) -> Iterator[Speaking]:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    rooms = {"cache": CacheSettings(redis_url=SecretStr(redis_url)), "http": HttpSettings(wait_s=5)} | settings

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[Any]:
        async with (
            stand_on(redis_url, folder, max_queued=10_000, **rooms) as stand,
            obliging(stand.jobs, stand.results),
        ):
            yield stand

    context = opened()
    with asyncio.Runner() as runner:
        stand = runner.run(context.__aenter__())
        yield Speaking(runner, stand, folder)
        runner.run(context.__aexit__(None, None, None))
