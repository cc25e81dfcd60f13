"""`tandem doctor` beside a server that runs."""

import asyncio
from typing import Any

import pytest
from support.listening import listening

from serve import __version__
from serve.doctor import server
from serve.readiness import PoolState

pytestmark = pytest.mark.anyio


async def test_a_server_that_runs_is_found_with_its_version_and_what_is_not_ready(
    stand: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening(stand.app) as port:
        url = f"http://127.0.0.1:{port}"
        seen = await asyncio.to_thread(server.check_server, url)
        assert seen.serving
        assert {each.level.value for each in seen.findings} == {"ok"}
        assert f"Tandem {__version__} answers at {url}" in {each.told for each in seen.findings}
        stand.pools["diffusion"] = PoolState(False, "no replica answers")
        monkeypatch.setattr("serve.readiness.READY_S", 0.0)
        monkeypatch.setattr(server, "__version__", "99.0")
        found = (await asyncio.to_thread(server.check_server, url)).findings
        assert [(each.level.value, each.code) for each in found] == [
            ("warning", "server-version"),
            ("fault", "server-not-ready"),
        ]
        assert "diffusion is not ready: no replica answers" in found[1].told
