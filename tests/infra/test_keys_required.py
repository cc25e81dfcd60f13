"""A server that can be reached from elsewhere does not start before there is an API key, unless none is needed."""

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Any

import pytest

from serve.cli.backstage import backstage
from serve.embedded import running_url
from serve.errors import OperatorError
from serve.local import prepare
from serve.settings.tree import Settings


def settings_of(data_dir: Path, host: str = "0.0.0.0", **rooms: Any) -> Settings:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Settings(data_dir=data_dir, http={"host": host, "port": port}, **rooms)


def required(settings: Settings) -> bool | None:
    with contextlib.ExitStack() as stack:
        return prepare(settings, stack)[0].keys.required


def refusal(settings: Settings) -> str:
    with pytest.raises(OperatorError) as refused:
        required(settings)
    assert refused.value.param == "keys.required"
    assert "\n" not in refused.value.message
    return refused.value.message


def test_the_first_key_opens_the_house(tmp_path: Path) -> None:
    data_dir = tmp_path / "my data"
    message = refusal(settings_of(data_dir))
    assert message.startswith("keys.required is on, because http.host 0.0.0.0 can be reached from elsewhere, and ")
    assert f"`tandem keys create NAME --data-dir '{data_dir}'`" in message
    assert "keys.required=false" in message
    assert running_url(data_dir) is None, "what was started is ended"

    async def create() -> None:
        async with backstage(Settings(data_dir=data_dir)) as stage:
            new = await stage.keys.create("a")
            await stage.keys.revoke(new.key.id)

    asyncio.run(create())
    assert required(settings_of(data_dir)) is True, "whoever made one means it, and may make the next any time"


def test_a_first_key_in_the_settings_is_as_good_as_one_that_was_made(tmp_path: Path) -> None:
    """The ingress makes it."""
    assert required(settings_of(tmp_path, keys={"first": f"tdm_{'b' * 12}_{'B' * 43}"})) is True


def test_on_a_given_redis_no_password_is_told(tmp_path: Path, redis_url: str) -> None:
    message = refusal(settings_of(tmp_path, jobs={"redis_url": redis_url}))
    assert "`tandem keys create NAME` with the same jobs.redis_url" in message
    assert redis_url.split("@")[0][9:] not in message


def test_on_loopback_or_where_somebody_said_so_none_is_needed(tmp_path: Path, redis_url: str) -> None:
    jobs = {"redis_url": redis_url}
    assert required(settings_of(tmp_path, "127.0.0.1", jobs=jobs)) is False
    assert required(settings_of(tmp_path, keys={"required": False}, jobs=jobs)) is False
    assert refusal(settings_of(tmp_path, "127.0.0.1", keys={"required": True}, jobs=jobs)).startswith(
        "keys.required is on, and there is no API key"
    )
