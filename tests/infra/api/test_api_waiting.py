"""`POST /v1/jobs?wait=true`: the answer is the job's end, and whoever hangs up cancels it."""

import asyncio
import base64
import contextlib
import gc
import io
import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from support.jobs import ANY
from support.listening import listening

from serve.domain.jobs import JobState
from serve.embedded import EmbeddedRedis
from serve.errors import BackendUnavailable
from serve.jobs.store import JobStore
from serve.settings.front import HttpSettings

pytestmark = pytest.mark.anyio
ORDER = {"prompt": "a red circle", "num_inference_steps": 2}


async def queued(stand: Any) -> str:
    """The id of the one job, as soon as it is there."""
    async with asyncio.timeout(10):
        while (claim := await stand.jobs.claim("test", ANY)) is None:
            await stand.jobs.wait_for_work("test", 1.0)
    await stand.jobs.release(claim)
    return str(claim.job_id)


async def state_of(stand: Any, job_id: str, wanted: JobState) -> None:
    async with asyncio.timeout(10), stand.jobs.changes(job_id) as changed:
        while (await stand.jobs.get(job_id)).state is not wanted:
            changed.clear()
            await changed.wait()


async def test_the_answer_is_the_job_s_end(stand: Any) -> None:
    async with listening(stand.app) as port, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}/v1/jobs?wait=true"
        asking = asyncio.create_task(client.post(url, json=ORDER))
        job_id = await queued(stand)
        await stand.finish(job_id)
        answer = await asking
        job = answer.json()
        assert (answer.status_code, job["id"], job["state"]) == (200, job_id, "succeeded")
        assert answer.headers["location"] == f"/v1/jobs/{job_id}"
        assert len(job["images"]) == 1
        asking = asyncio.create_task(client.post(url, json=ORDER))
        await client.delete(f"http://127.0.0.1:{port}/v1/jobs/{await queued(stand)}")
        assert (await asking).json()["state"] == "cancelled"
        refused = await client.post(url, json={"prompt": ""})
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "prompt")
    assert await stand.jobs.queue_depth() == 0


@pytest.mark.parametrize("running", [False, True])
async def test_whoever_hangs_up_cancels_the_job(stand: Any, running: bool) -> None:
    body = json.dumps(ORDER).encode()
    head = "POST /v1/jobs?wait=true HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    async with listening(stand.app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        await writer.drain()
        job_id = await queued(stand)
        claim = await stand.jobs.claim("test", ANY) if running else None
        writer.close()
        if claim is None:
            await state_of(stand, job_id, JobState.CANCELLED)
        else:
            async with asyncio.timeout(10):
                while await stand.jobs.renew(claim, 1):  # until the worker is told
                    pass
            await stand.jobs.cancelled(claim)
    assert (await stand.jobs.get(job_id)).state is JobState.CANCELLED


def carried(
    app: Any, body: bytes, gone: asyncio.Event, path: str = "/v1/jobs", key: bytes | None = None
) -> asyncio.Task[None]:
    """The application as an ASGI server calls it; `gone`: the caller hangs up."""
    method = "POST" if path == "/v1/jobs" else "PUT"
    scope = {"type": "http", "method": method, "path": path, "query_string": b"wait=true", "root_path": ""}
    headers = [(b"content-type", b"application/json")] + ([(b"idempotency-key", key)] if key else [])
    scope |= {"headers": headers, "app": app}
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    return asyncio.create_task(app(scope, receive, send))


async def test_a_carrier_that_tells_of_a_hang_up_twice_cancels_the_job(stand: Any) -> None:
    """As Ray Serve does: the disconnect, then the task's cancellation, at whatever moment."""
    for moments in range(40):
        gone = asyncio.Event()
        answering = carried(stand.app, json.dumps(ORDER).encode(), gone)
        job_id = await queued(stand)
        gone.set()
        for _ in range(moments):
            await asyncio.sleep(0)
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        assert (await stand.jobs.get(job_id)).state is JobState.CANCELLED


async def test_whoever_can_ask_again_cancels_nothing_by_hanging_up(stand: Any) -> None:
    body = json.dumps(ORDER).encode()
    for path, key in (("/v1/jobs", b"a-key"), (f"/v1/jobs/{'ab' * 16}", None)):
        for cut in (False, True):
            gone = asyncio.Event()
            answering = carried(stand.app, body, gone, path, key)
            job_id = await queued(stand)
            if cut:
                answering.cancel()  # as Ray Serve does
            gone.set()
            await asyncio.gather(answering, return_exceptions=True)
            assert (await stand.jobs.get(job_id)).state is JobState.QUEUED
        await stand.jobs.cancel(job_id)


async def test_a_carrier_that_cancels_the_request_cancels_the_job(stand: Any) -> None:
    body = json.dumps(ORDER).encode()
    async with stand.jobs.changes("0" * 32):
        before = asyncio.all_tasks()  # among them the process's one subscription, which stays
    answering = carried(stand.app, body, asyncio.Event())
    job_id = await queued(stand)
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert (await stand.jobs.get(job_id)).state is JobState.CANCELLED
    # Also one that was cancelled before the job was logged, at whatever moment.
    for moments in range(40):
        answering = carried(stand.app, body, asyncio.Event())
        for _ in range(moments):
            await asyncio.sleep(0)
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering
        assert await stand.jobs.queue_depth() == 0
    async with asyncio.timeout(10):
        while asyncio.all_tasks() - before:
            await stand.jobs.ping()


async def test_nothing_of_the_order_is_held_while_its_end_is_waited_for(stand: Any) -> None:
    noise = Image.frombytes("RGB", (1024, 1024), os.urandom(3 << 20))
    file = io.BytesIO()
    noise.save(file, "PNG")
    order = ORDER | {"image": base64.b64encode(file.getvalue()).decode(), "width": 64, "height": 64}
    gone = asyncio.Event()
    first = carried(stand.app, json.dumps(ORDER).encode(), gone)  # what is loaded once
    held = [await queued(stand)]
    body = json.dumps(order).encode()
    del order
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    task = carried(stand.app, body, gone)
    size = len(body)
    del body
    await stand.jobs.cancel(held[0])
    held.append(await queued(stand))
    try:
        deadline = time.monotonic() + 10
        while gc.collect() >= 0 and tracemalloc.get_traced_memory()[0] - before > size / 4:
            assert time.monotonic() < deadline
            await stand.jobs.ping()
    finally:
        tracemalloc.stop()
        gone.set()
        await asyncio.gather(first, task)


async def test_without_redis_the_answer_names_the_job_that_goes_on(
    jobs_redis: EmbeddedRedis, tmp_path: Path, stand_on: Any, refused: Any
) -> None:
    async with stand_on(jobs_redis.url, tmp_path) as stand:
        asking = asyncio.create_task(stand.client.post("/v1/jobs?wait=1", json=ORDER))
        job_id = await queued(stand)
        jobs_redis.stop()
        async with asyncio.timeout(30):
            assert job_id in refused(await asking, 503, "jobs.redis_url")["message"]


async def test_wait_is_yes_or_no(stand: Any, refused: Any) -> None:
    refused(await stand.client.post("/v1/jobs?wait=soon", json=ORDER), 422, "wait")
    assert (await stand.client.post("/v1/jobs?wait=false", json=ORDER)).status_code == 202


async def test_a_caller_who_hangs_up_while_redis_is_away_cancels_the_job_when_it_is_back(
    jobs_redis: EmbeddedRedis, tmp_path: Path, stand_on: Any
) -> None:
    async with stand_on(jobs_redis.url, tmp_path) as stand:
        gone = asyncio.Event()
        answering = carried(stand.app, json.dumps(ORDER).encode(), gone)
        job_id = await queued(stand)
        jobs_redis.stop()
        answering.cancel()  # as Ray Serve does
        with pytest.raises(asyncio.CancelledError):
            await answering
        jobs_redis.start()
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(BackendUnavailable):
                    if (await stand.jobs.get(job_id)).state is JobState.CANCELLED:
                        break
                await asyncio.sleep(0)


async def test_waiting_reads_no_step_and_no_preview(stand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    async def events_after(*args: Any, **more: Any) -> Any:
        read.append(args)

    monkeypatch.setattr(JobStore, "events_after", events_after)
    asking = asyncio.create_task(stand.client.post("/v1/jobs?wait=1", json=ORDER | {"preview_every": 1}))
    await stand.finish(await queued(stand))
    assert (await asking).json()["state"] == "succeeded"
    assert read == []


async def test_a_repeated_order_whose_job_has_ended_is_answered_at_once(stand: Any) -> None:
    key = {"Idempotency-Key": "a-key"}
    asking = asyncio.create_task(stand.client.post("/v1/jobs?wait=true", json=ORDER, headers=key))
    await stand.finish(await queued(stand))
    first = (await asking).json()
    stand.jobs._bell._lately.clear()  # as though it were long ago
    async with asyncio.timeout(4):  # less than who hears nothing takes to look again
        again = await stand.client.post("/v1/jobs?wait=true", json=ORDER, headers=key)
    assert (again.json()["id"], again.json()["state"]) == (first["id"], "succeeded")


async def test_what_takes_too_long_is_answered_before_a_proxy_cuts_it(
    stand_on: Any, redis_url: str, tmp_path: Path
) -> None:
    async with stand_on(redis_url, tmp_path, http=HttpSettings(wait_s=0.2)) as stand:
        answer = await stand.client.post("/v1/jobs?wait=true", json=ORDER)
        job = answer.json()
        assert (answer.status_code, job["state"]) == (202, "queued")
        assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
        assert (await stand.jobs.get(job["id"])).state is JobState.QUEUED


async def test_the_operator_may_let_jobs_outlive_their_callers(stand_on: Any, redis_url: str, tmp_path: Path) -> None:
    async with stand_on(redis_url, tmp_path, http=HttpSettings(cancel_on_disconnect=False)) as stand:
        gone = asyncio.Event()
        answering = carried(stand.app, json.dumps(ORDER).encode(), gone)
        job_id = await queued(stand)
        gone.set()
        await answering
        assert (await stand.jobs.get(job_id)).state is JobState.QUEUED
