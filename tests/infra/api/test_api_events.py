"""Server-Sent Events of a job."""

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import fastapi.routing
import pytest
import redis.asyncio
from support.follower import Follower
from support.jobs import ANY, a_preview, until
from support.listening import listening

from serve.embedded import EmbeddedRedis

pytestmark = pytest.mark.anyio


def parsed(stream: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(id, event, data) of each event of a stream."""
    events = []
    for block in stream.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "event" in fields:
            events.append((fields.get("id", ""), fields["event"], json.loads(fields["data"])))
    return events


async def test_events_from_first_to_last_and_from_any_of_them(stand: Any) -> None:
    job = await stand.create(num_inference_steps=3)
    await stand.finish(job["id"], steps=3)
    answer = await stand.client.get(f"/v1/jobs/{job['id']}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    events = parsed(answer.text)
    states = [(name, data["state"], data["step"]) for _, name, data in events]
    assert states[:2] == [("state", "queued", 0), ("state", "encoding", 0)]
    assert states[2:-1] == [("step", "running", step) for step in (1, 2, 3)]
    assert states[-1] == ("state", "succeeded", 3)
    for index, (event_id, _, _) in enumerate(events):
        rest = await stand.client.get(f"/v1/jobs/{job['id']}/events", headers={"last-event-id": event_id})
        assert parsed(rest.text) == events[index + 1 :]


@pytest.mark.parametrize("given_id", ["x", "1", "1-", "-1-1", "1-1 ", "9" * 20 + "-0", "$", "+"])
async def test_a_last_event_id_that_is_none_of_ours(stand: Any, given_id: str, refused: Any) -> None:
    job = await stand.create()
    answer = await stand.client.get(f"/v1/jobs/{job['id']}/events", headers={"last-event-id": given_id})
    refused(answer, 422, "last-event-id")


async def test_previews_are_events_of_their_own(stand: Any) -> None:
    job = await stand.create(num_inference_steps=4, preview_every=2)
    claim = await stand.jobs.claim("test", ANY)
    assert claim is not None
    follower = Follower(stand.app, f"/v1/jobs/{job['id']}/events")
    await stand.jobs.renew(claim, 2)
    await stand.jobs.preview(claim, a_preview(0, 2, 4, b"a JPEG"))
    seen = await follower.until(lambda seen: "event: preview" in seen)
    event_id, name, data = parsed(seen)[-1]
    assert name == "preview"
    assert data == {
        "state": "running",
        "step": 2,
        "steps": 4,
        "index": 0,
        "image": "data:image/jpeg;base64," + base64.b64encode(b"a JPEG").decode(),
    }
    await stand.jobs.cancel(job["id"])
    await stand.jobs.cancelled(claim)
    await follower.until(lambda seen: '"cancelled"' in seen)
    await follower.task
    rest = await stand.client.get(f"/v1/jobs/{job['id']}/events", headers={"last-event-id": event_id})
    assert [data["state"] for _, _, data in parsed(rest.text)] == ["cancelled"]
    assert "preview" not in (await stand.client.get(f"/v1/jobs/{job['id']}/events")).text, "they are not kept"


async def test_events_arrive_as_they_happen_and_the_stream_ends_with_the_job(stand: Any) -> None:
    job = await stand.create()
    follower = Follower(stand.app, f"/v1/jobs/{job['id']}/events")
    await follower.until(lambda seen: '"queued"' in seen)
    claim = await stand.jobs.claim("test", ANY)
    assert claim is not None
    await follower.until(lambda seen: '"encoding"' in seen)
    await stand.jobs.renew(claim, 1)
    await follower.until(lambda seen: "event: step" in seen)
    await stand.jobs.cancel(job["id"])
    await stand.jobs.cancelled(claim)
    await follower.until(lambda seen: '"cancelled"' in seen)
    async with asyncio.timeout(10):
        await follower.task


async def test_a_silent_stream_has_a_heartbeat(stand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastapi.routing._PING_INTERVAL == 15
    monkeypatch.setattr(fastapi.routing, "_PING_INTERVAL", 0.01)
    job = await stand.create()
    follower = Follower(stand.app, f"/v1/jobs/{job['id']}/events")
    await follower.until(lambda seen: seen.count(": ping\n\n") >= 2)
    follower.left.set()
    await follower.task


async def test_a_real_server_s_stream_says_when_to_come_back_and_has_heartbeats(
    stand: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastapi.routing, "_PING_INTERVAL", 0.05)
    job = await stand.create()
    async with listening(stand.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET /v1/jobs/{job['id']}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        seen = b""
        async with asyncio.timeout(10):
            while seen.count(b": ping\n\n") < 3:
                seen += await reader.read(4096)
        writer.close()
    head, _, body = seen.partition(b"\r\n\r\n")
    assert b"text/event-stream" in head
    assert b"x-accel-buffering: no" in head.lower()
    assert b"retry: 2000\n\n" in body[:40]


async def test_previews_can_be_left_out(stand: Any) -> None:
    job = await stand.create(num_inference_steps=4, preview_every=2)
    claim = await stand.jobs.claim("test", ANY)
    await stand.jobs.preview(claim, a_preview(0, 2, 4, b"a JPEG"))
    follower = Follower(stand.app, f"/v1/jobs/{job['id']}/events", b"previews=false")
    await stand.jobs.renew(claim, 3)
    seen = await follower.until(lambda seen: "event: step" in seen)
    assert [name for _, name, _ in parsed(seen)] == ["state", "state", "step"]
    follower.left.set()
    await follower.task
    answer = await stand.client.get(f"/v1/jobs/{job['id']}/events?previews=maybe")
    assert answer.status_code == 422


async def test_two_hundred_streams_and_waits_that_are_cut_leave_nothing(stand: Any, redis_url: str) -> None:
    """Over real connections: no task, no subscription, no channel, and of the waits no job."""
    kept = (await stand.create())["id"]
    bell = stand.jobs._bell
    wait = json.dumps({"prompt": "a red circle"}).encode()
    requests = [f"GET /v1/jobs/{kept}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode()] * 20
    requests += [
        b"POST /v1/jobs?wait=true HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(wait)}\r\n\r\n".encode()
        + wait
    ] * 20
    async with (
        listening(stand.app) as port,
        redis.asyncio.Redis.from_url(redis_url) as client,
        asyncio.timeout(120),
        stand.jobs.changes(kept),
    ):
        await client.ping()
        before = asyncio.all_tasks()  # among them the process's one subscription, which stays
        waiting = dict(bell._waiting)
        for _ in range(10):
            connections = [await asyncio.open_connection("127.0.0.1", port) for _ in requests]
            for (_, writer), request in zip(connections, requests, strict=True):
                writer.write(request)
            await until(lambda: reached(stand, 21))
            for _, writer in connections:
                writer.close()
            await until(lambda: reached(stand, 1))
            for _, writer in connections:
                await writer.wait_closed()

        async def nothing_left() -> bool:
            await client.ping()
            channels = await client.pubsub_channels("tandem:events:*")
            return not asyncio.all_tasks() - before and len(channels) == 1 and bell._waiting.keys() == waiting.keys()

        await until(nothing_left)
        assert all(len(events) == 1 for events in bell._waiting.values())
    assert not stand.app.state.service._withdrawing


async def reached(stand: Any, jobs: int) -> bool:
    return bool(await stand.jobs.queue_depth() == jobs)


async def test_a_client_that_goes_away_leaves_nothing_running(stand: Any, redis_url: str) -> None:
    jobs = [(await stand.create())["id"] for _ in range(20)]
    async with stand.jobs.changes(jobs[0]):
        before = asyncio.all_tasks()  # among them the process's one subscription, which stays
    followers = [Follower(stand.app, f"/v1/jobs/{job}/events") for job in jobs for _ in range(2)]
    for follower in followers:
        await follower.until(lambda seen: '"queued"' in seen)
    async with asyncio.timeout(60), redis.asyncio.Redis.from_url(redis_url) as client:
        assert len(await client.pubsub_channels("tandem:events:*")) == len(jobs)
        for follower in followers:
            follower.left.set()
        await asyncio.gather(*(follower.task for follower in followers))
        while await client.pubsub_channels("tandem:events:*") or asyncio.all_tasks() - before:
            pass
    assert await stand.jobs.queue_depth() == len(jobs)


async def test_a_stream_whose_redis_goes_away_ends_with_an_error(
    jobs_redis: EmbeddedRedis, tmp_path: Path, stand_on: Any
) -> None:
    async with stand_on(jobs_redis.url, tmp_path) as stand:
        job = await stand.create()
        follower = Follower(stand.app, f"/v1/jobs/{job['id']}/events")
        await follower.until(lambda seen: '"queued"' in seen)
        jobs_redis.stop()
        seen = await follower.until(lambda seen: "event: error" in seen)
        assert parsed(seen)[-1][2]["error"]["param"] == "jobs.redis_url"
        await follower.task
