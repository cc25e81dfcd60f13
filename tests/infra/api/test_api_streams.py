"""How many event streams and waits one caller may have open."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.follower import Follower
from support.jobs import until

from serve.settings.front import HttpSettings, KeySettings
from serve.settings.stores import CacheSettings

pytestmark = pytest.mark.anyio
ORDER = {"prompt": "a red circle", "num_inference_steps": 2}


@pytest.fixture
async def bounded(redis_url: str, tmp_path: Path, stand_on: Any) -> AsyncIterator[Any]:
    async with stand_on(
        redis_url, tmp_path, keys=KeySettings(required=True), http=HttpSettings(max_streams=2)
    ) as stand:
        yield stand
        assert not stand.app.state.streams.open


async def ordered(stand: Any, headers: dict[str, str]) -> str:
    return str((await stand.client.post("/v1/jobs", json=ORDER, headers=headers)).json()["id"])


async def queued(stand: Any, jobs: int) -> bool:
    return bool(await stand.jobs.queue_depth() == jobs)


def following(stand: Any, job_id: str, headers: dict[str, str]) -> Follower:
    return Follower(stand.app, f"/v1/jobs/{job_id}/events", headers=headers)


async def left(*followers: Follower) -> None:
    for follower in followers:
        follower.left.set()
    await asyncio.gather(*(follower.task for follower in followers))


async def test_one_stream_too_many_is_a_429_for_its_caller_alone(bounded: Any, refused: Any) -> None:
    mine, theirs = await bounded.key(), await bounded.key()
    job, other = await ordered(bounded, mine), await ordered(bounded, theirs)
    followers = [following(bounded, job, mine) for _ in range(2)]
    assert [await each.status() for each in followers] == [200, 200]
    answer = await bounded.client.get(f"/v1/jobs/{job}/events", headers=mine)
    error = refused(answer, 429, None)
    assert (error["code"], error["type"]) == ("too_many_streams", "unavailable_error")
    assert "http.max_streams" in error["message"]
    assert int(answer.headers["retry-after"]) >= 1
    others = following(bounded, other, theirs)
    assert await others.status() == 200
    assert (await bounded.client.get(f"/v1/jobs/{job}", headers=mine)).status_code == 200
    await left(*followers, others)


async def test_a_wait_is_one_too_and_the_refused_one_orders_nothing(bounded: Any, refused: Any) -> None:
    mine = await bounded.key()
    job = await ordered(bounded, mine)
    follower = following(bounded, job, mine)
    assert await follower.status() == 200
    waiting = asyncio.create_task(bounded.client.post("/v1/jobs?wait=true", json=ORDER, headers=mine))
    await until(lambda: queued(bounded, 2))
    for method, path in (("POST", "/v1/jobs"), ("PUT", f"/v1/jobs/{'ab' * 16}")):
        answer = await bounded.client.request(method, f"{path}?wait=true", json=ORDER, headers=mine)
        assert refused(answer, 429, None)["code"] == "too_many_streams"
    refused(await bounded.client.get(f"/v1/jobs/{job}/events", headers=mine), 429, None)
    assert await bounded.jobs.queue_depth() == 2
    for listed in (await bounded.client.get("/v1/jobs", headers=mine)).json()["data"]:
        await bounded.client.delete(f"/v1/jobs/{listed['id']}", headers=mine)
    assert (await waiting).json()["state"] == "cancelled"
    await follower.task  # its job has ended
    assert not bounded.app.state.streams.open


async def test_however_a_stream_ends_it_counts_no_more(bounded: Any) -> None:
    mine = await bounded.key()
    job = await ordered(bounded, mine)
    for _ in range(3):
        for cut in (False, True):
            followers = [following(bounded, job, mine) for _ in range(2)]
            assert [await each.status() for each in followers] == [200, 200]
            for follower in followers:
                follower.task.cancel() if cut else follower.left.set()
            await asyncio.gather(*(follower.task for follower in followers), return_exceptions=True)
            assert not bounded.app.state.streams.open
        for path in (f"/v1/jobs/{'0' * 32}/events", f"/v1/jobs/{job}/events?previews=x"):
            assert (await bounded.client.get(path, headers=mine)).status_code in (404, 422)
        refused = await bounded.client.post("/v1/jobs?wait=true", json={"prompt": ""}, headers=mine)
        assert refused.status_code == 422
    for _ in range(3):  # a wait whose task is cancelled, as Ray Serve does
        waiting = asyncio.create_task(bounded.client.post("/v1/jobs?wait=true", json=ORDER, headers=mine))
        await until(lambda: queued(bounded, 2))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert await bounded.jobs.queue_depth() == 1
        assert not bounded.app.state.streams.open


async def test_tenants_are_bounded_and_who_is_not_told_apart_is_not(
    redis_url: str, tmp_path: Path, stand_on: Any
) -> None:
    http = HttpSettings(max_streams=1)
    async with stand_on(redis_url, tmp_path, http=http, cache=CacheSettings(salt_header="x-tenant")) as stand:
        for headers, status in (({"x-tenant": "one"}, 429), ({}, 200)):
            job = await ordered(stand, headers)
            followers = [following(stand, job, headers)]
            assert await followers[0].status() == 200
            followers.append(following(stand, job, headers))
            assert await followers[1].status() == status
            await left(*followers)
        assert not stand.app.state.streams.open
