"""What the ingress adds to the application: it hears of hang-ups as Serve tells of them, and keeps its chores up."""

import asyncio
import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from ray.exceptions import TaskCancelledError
from support.follower import Follower
from support.jobs import until

from deployments import chores
from deployments.carried import carried
from deployments.chores import kept_up, tell_rules
from deployments.ingress import Ingress
from serve.embedded import EmbeddedRedis
from serve.errors import OperatorError
from serve.jobs.store import JobStore
from serve.settings.front import KeySettings
from serve.settings.stores import JobSettings
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics

pytestmark = pytest.mark.anyio


class Cancelled(Follower):
    """Serve's `receive`: the question to the proxy is cancelled with the request; then it says nothing more."""

    told = False

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        if self.told:
            await asyncio.Event().wait()
        self.told = True
        raise TaskCancelledError


async def test_who_hangs_up_under_serve_leaves_nothing_in_the_log(stand: Any, caplog: pytest.LogCaptureFixture) -> None:
    app = carried(stand.app)
    job = await stand.create()
    follower = Cancelled(app, f"/v1/jobs/{job['id']}/events")
    await follower.until(lambda seen: '"queued"' in seen)
    follower.left.set()
    async with asyncio.timeout(10):
        await follower.task
    unread = Cancelled(app, "/v1/jobs")  # its body never comes
    unread.left.set()
    async with asyncio.timeout(10):
        await unread.task
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert not stand.jobs._bell._waiting


async def test_a_wait_that_serve_cuts_cancels_its_job(stand: Any, caplog: pytest.LogCaptureFixture) -> None:
    app, gone = carried(stand.app), asyncio.Event()
    messages = [{"type": "http.request", "body": json.dumps({"prompt": "a red circle"}).encode()}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        raise TaskCancelledError

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/jobs", "query_string": b"wait=true", "root_path": ""}
    scope |= {"headers": [(b"content-type", b"application/json")]}
    waiting = asyncio.create_task(app(scope, receive, send))  # type: ignore[arg-type]

    async def depth(jobs: int) -> bool:
        return bool(await stand.jobs.queue_depth() == jobs)

    await until(lambda: depth(1))
    gone.set()
    async with asyncio.timeout(10):
        await waiting
    assert await depth(0)
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_chore_that_breaks_is_logged_and_begun_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(chores, "BEGIN_AGAIN_S", 0.0)
    begun, thrice = 0, asyncio.Event()

    async def chore() -> None:
        nonlocal begun
        begun += 1
        if begun == 1:
            raise ExceptionGroup("unexpected", [RuntimeError("a bug")])
        if begun == 3:
            thrice.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(kept_up("the chore", chore))
    async with asyncio.timeout(10):
        await thrice.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert begun == 3
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert told == ["the chore has broken, and is begun again", "the chore has ended, and is begun again"]


async def test_the_settings_of_jobs_are_told_again_after_an_outage(
    jobs_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chores, "TELL_AGAIN_S", 0.01)
    url = SecretStr(jobs_redis.url)
    server, operator = (JobStore(JobSettings(redis_url=url, max_queued=each), InProcessMetrics()) for each in (7, 8))

    async def known() -> bool:
        return (await operator.told_rules()).max_queued == 7

    jobs_redis.stop()
    task = asyncio.create_task(tell_rules(server))
    await asyncio.sleep(0)
    jobs_redis.start()
    await until(known, 30)
    await operator._redis.flushall()
    await until(known, 30)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await server.close()
    await operator.close()


def settings(url: str, folder: Path, *, keys: bool) -> Settings:
    return Settings(data_dir=folder, jobs=JobSettings(redis_url=SecretStr(url)), keys=KeySettings(required=keys))


@pytest.mark.filterwarnings("ignore:coroutine 'Ingress.__del__' was never awaited")  # Python calls it once more
async def test_an_ingress_that_may_not_start_can_be_ended(redis_url: str, tmp_path: Path) -> None:
    """Serve awaits `__del__` whatever became of the constructor."""
    before = asyncio.all_tasks()
    begun: Any = Ingress.__new__(Ingress)
    with pytest.raises(OperatorError, match=r"keys\.required"):
        await begun.__init__(settings(redis_url, tmp_path, keys=True), {}, {})
    await begun.__del__()
    whole: Any = Ingress.__new__(Ingress)
    await whole.__init__(settings(redis_url, tmp_path, keys=False), defaultdict(object), {})
    told = JobStore(JobSettings(redis_url=SecretStr(redis_url)), InProcessMetrics())
    await until(lambda: told._redis.exists("tandem:rules"))
    await told.close()
    await whole.__del__()
    assert asyncio.all_tasks() <= before
