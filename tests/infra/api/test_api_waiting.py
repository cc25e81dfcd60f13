"""`POST /v1/jobs?wait=true`: the answer is the job's end, and whoever hangs up cancels it."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.requests import Request
from support.jobs import ANY

from serve.api.waiting import ended
from serve.domain import JobState
from serve.embedded import EmbeddedRedis
from serve.orders import NewImage

pytestmark = pytest.mark.anyio
ORDER = {"prompt": "a red circle", "num_inference_steps": 2}


@contextlib.asynccontextmanager
async def listening(app: Any) -> AsyncIterator[int]:
    """The application under uvicorn; the port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # so that whoever connects too early waits
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        yield listener.getsockname()[1]
        server.should_exit = True
        await serving


async def queued(stand: Any) -> str:
    """The id of the one job, as soon as it is there."""
    async with asyncio.timeout(10):
        while (claim := await stand.jobs.claim("test", ANY)) is None:
            await stand.jobs.wait_for_work(1.0)
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


async def test_a_carrier_that_cancels_the_request_cancels_the_job(stand: Any) -> None:
    async def silent() -> Any:
        await asyncio.Event().wait()

    request = Request({"type": "http"}, silent)
    async with stand.jobs.changes("0" * 32):
        before = asyncio.all_tasks()  # among them the process's one subscription, which stays
    answering = asyncio.create_task(ended(request, stand.app.state.service, NewImage(prompt="a red circle")))
    job_id = await queued(stand)
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert (await stand.jobs.get(job_id)).state is JobState.CANCELLED
    # Also one that was cancelled before the job was logged.
    answering = asyncio.create_task(ended(request, stand.app.state.service, NewImage(prompt="a red circle")))
    await asyncio.sleep(0)
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert await stand.jobs.queue_depth() == 0
    async with asyncio.timeout(10):
        while asyncio.all_tasks() - before:
            await stand.jobs.ping()


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
