"""Options that are kept for a caller, on a real Redis."""

import asyncio

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from serve.jobs.options import OPTIONS_S
from serve.jobs.store import JobStore
from serve.settings.stores import JobSettings
from serve.telemetry.metrics import InProcessMetrics

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_every_process_sees_what_a_caller_has_set_and_nobody_elses(redis_url: str) -> None:
    settings = JobSettings(redis_url=SecretStr(redis_url))
    one, other = (JobStore(settings, InProcessMetrics()) for _ in range(2))
    assert await one.options("key") == {}
    await asyncio.gather(one.set_options("key", {"a": 1, "b": "text"}), other.set_options("key", {"c": None}))
    await other.set_options("key", {"a": [2]})
    await other.set_options("key", {})
    assert await one.options("key") == await other.options("key") == {"a": [2], "b": "text", "c": None}
    assert await one.options("") == {}
    redis = Redis.from_url(redis_url)
    left_s = (await redis.pttl("tandem:options:key")) / 1000
    assert OPTIONS_S - 60 < left_s <= OPTIONS_S
    await one.check_integrity()
    await redis.aclose()
    await one.close()
    await other.close()
