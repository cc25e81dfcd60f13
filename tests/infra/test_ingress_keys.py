"""The ingress asks for keys unless told otherwise, and refuses to start where nobody could pass."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from deployments.chores import keep_first_key
from deployments.ingress import _open_keys
from serve.embedded import EmbeddedRedis
from serve.errors import BackendUnavailable, OperatorError
from serve.keys import KeyStore
from serve.settings.front import KeySettings
from serve.settings.stores import JobSettings
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics

FIRST = f"tdm_{'b' * 12}_{'B' * 43}"


def opened(url: str, required: bool | None, first: str | None = None) -> KeyStore | None:
    keys = KeySettings(required=required, first=first and SecretStr(first))
    settings = Settings(jobs=JobSettings(redis_url=SecretStr(url)), keys=keys)
    parts: Any = SimpleNamespace(metrics=InProcessMetrics())

    async def story() -> KeyStore | None:
        keys = await _open_keys(settings, parts)
        if keys is not None:
            await keys.close()
        return keys

    return asyncio.run(story())


@pytest.mark.parametrize("required", [None, True])
def test_without_any_key_the_ingress_refuses_to_start(redis_url: str, required: bool | None) -> None:
    with pytest.raises(OperatorError) as raised:
        opened(redis_url, required)
    assert raised.value.param == "keys.required"
    assert "tandem keys create" in raised.value.message
    assert "\n" not in raised.value.message

    async def create() -> None:
        keys = KeyStore(JobSettings(redis_url=SecretStr(redis_url)), InProcessMetrics())
        await keys.create("a key")
        await keys.close()

    asyncio.run(create())
    assert opened(redis_url, required) is not None


def test_whoever_is_told_so_serves_without(redis_url: str) -> None:
    assert opened(redis_url, False) is None


def test_a_redis_that_is_away_opens_nothing(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path, "jobs") as server:
        url = server.url
    assert opened(url, None) is not None, "keys are asked for all the same"


def test_the_first_key_of_the_settings_opens_the_house(redis_url: str) -> None:
    assert opened(redis_url, None, FIRST) is not None
    assert opened(redis_url, None) is not None, "it is a key like any other, also for a server that is told of none"


class Watched(KeyStore):
    """Tells what has come of each first key that was made."""

    def __init__(self, url: str) -> None:
        super().__init__(JobSettings(redis_url=SecretStr(url)), InProcessMetrics())
        self.outcomes: asyncio.Queue[str | None] = asyncio.Queue()

    async def make_first(self, token: str) -> str | None:
        outcome = await super().make_first(token)
        self.outcomes.put_nowait(outcome)
        return outcome


@contextlib.asynccontextmanager
async def kept(keys: KeyStore) -> AsyncIterator[None]:
    chore = asyncio.create_task(keep_first_key(keys, FIRST))
    async with asyncio.timeout(20):
        yield
    chore.cancel()
    await asyncio.wait([chore])


def test_the_first_key_is_made_once_the_job_store_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a cluster start in any order."""
    monkeypatch.setattr("deployments.chores.BEGIN_AGAIN_S", 0.05)
    server = EmbeddedRedis(tmp_path, "jobs")
    server.start()
    server.kill()
    assert opened(server.url, None, FIRST) is not None

    async def story() -> None:
        keys = Watched(server.url)
        with pytest.raises(BackendUnavailable):
            await keys.find(FIRST)
        async with kept(keys):
            await asyncio.to_thread(server.start)
            assert await keys.outcomes.get() is None
        assert (await keys.find(FIRST)).name == "first"
        await keys.close()

    try:
        asyncio.run(story())
    finally:
        server.stop()


def test_a_first_key_that_opens_nothing_is_told_of_once(
    redis_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.chores.TELL_AGAIN_S", 0.0)

    async def story() -> None:
        keys = Watched(redis_url)
        await keys.make_first(FIRST)
        await keys.revoke("b" * 12)
        async with kept(keys):
            told = [await keys.outcomes.get() for _ in range(5)]
        assert told == [None] + [f"key {'b' * 12} was revoked"] * 4
        await keys.close()

    with caplog.at_level(logging.WARNING, "deployments.chores"):
        asyncio.run(story())
    assert caplog.messages == [f"keys.first opens nothing: key {'b' * 12} was revoked"]
