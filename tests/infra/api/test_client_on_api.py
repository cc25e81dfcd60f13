"""The client against the real API, service and job store, over a real connection."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.listening import listening

from serve.cli.client import Client
from serve.domain.jobs import JobState
from serve.errors import InvalidRequest, JobNotFound, Unavailable

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def connected(app: Any) -> AsyncIterator[Client]:
    """A client of the application, which listens on loopback."""
    async with listening(app) as port, Client(f"http://127.0.0.1:{port}", poll_s=0.05) as client:
        yield client


async def test_from_order_to_picture(stand: Any) -> None:
    async with connected(stand.app) as client:
        job = await client.submit("a red circle", seed=7, width=None, num_inference_steps=2)
        assert (job.state, job.position, job.seed, job.model, job.steps) == (JobState.QUEUED, 1, 7, "shapes", 2)
        seen = []

        async def follow() -> None:
            seen.extend([(progress.state.value, progress.step) async for progress in client.follow(job.id)])

        following = asyncio.create_task(follow())
        await stand.finish(job.id)
        await asyncio.wait_for(following, 10)
        assert seen[-1] == ("succeeded", 2)
        assert [step for _, step in seen] == sorted(step for _, step in seen)
        done = await client.get(job.id)
        assert (done.state, len(done.images)) == (JobState.SUCCEEDED, 1)
        assert (await client.image(job.id, 0)).startswith(b"\x89PNG")


async def test_a_refusal_names_the_field(stand: Any) -> None:
    async with connected(stand.app) as client:
        wrong = {"prompt": " ", "num_inference_steps": 0, "guidance_scale": float("nan"), "width": 100}
        for param, value in wrong.items():
            with pytest.raises(InvalidRequest, match=param) as refused:
                await client.submit(**{"prompt": "x", param: value})
            assert refused.value.param == param
        with pytest.raises(JobNotFound):
            await client.get("0" * 32)
        with pytest.raises(JobNotFound):
            async for _ in client.follow("0" * 32):
                pass


async def test_a_full_queue_says_when_to_come_back(stand_on: Any, redis_url: str, tmp_path: Path) -> None:
    async with stand_on(redis_url, tmp_path, max_queued=1) as stand, connected(stand.app) as client:
        await client.submit("a red circle")
        with pytest.raises(Unavailable) as full:
            await client.submit("a red circle")
        assert (full.value.retry_after_s or 0) > 0


async def test_cancelling_ends_the_following(stand: Any) -> None:
    async with connected(stand.app) as client:
        job = await client.submit("a red circle")
        assert (await client.cancel(job.id)).state is JobState.CANCELLED
        progress = [progress async for progress in client.follow(job.id)]
        assert progress[-1].state is JobState.CANCELLED


async def test_pools_as_the_server_tells_them(stand: Any) -> None:
    async with connected(stand.app) as client:
        pools = await client.pools()
        assert pools is not None
        assert {pool.name: pool.ready for pool in pools} == {"text_encoder": True, "diffusion": True}
