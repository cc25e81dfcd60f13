"""The ingress asks for keys unless told otherwise, and refuses to start where nobody could pass."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from deployments.ingress import _open_keys
from serve.embedded import EmbeddedRedis
from serve.errors import OperatorError
from serve.keys import KeyStore
from serve.settings import JobSettings, KeySettings, Settings
from serve.telemetry.metrics import InProcessMetrics


def opened(url: str, required: bool | None) -> KeyStore | None:
    settings = Settings(jobs=JobSettings(redis_url=SecretStr(url)), keys=KeySettings(required=required))
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
