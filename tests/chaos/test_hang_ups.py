"""A few hundred clients hang up on the API under uvicorn, in the test's own event loop: so its tasks can be counted.
`make chaos` has ten thousand, on the whole server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from pydantic import SecretStr
from support.chaos_hang_ups import HangUps
from support.chaos_server import an_order
from support.listening import listening

from serve.api.app import create_app
from serve.catalog import open_catalog
from serve.domain.text import EncodeUnit
from serve.encoders.cache import EmbeddingCache
from serve.errors import BackendUnavailable
from serve.jobs.store import JobStore
from serve.placements import Fleet, plan_placements
from serve.results.store import open_store
from serve.service import ImageService
from serve.settings.stores import JobSettings
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics
from serve.text import TextService

pytestmark = pytest.mark.anyio

HANG_UPS = 300


async def nobody(units: Sequence[EncodeUnit]) -> Any:
    raise BackendUnavailable("the text encoder does not answer")


async def test_hang_ups_leave_no_task_no_channel_and_no_job(redis_url: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, jobs=JobSettings(redis_url=SecretStr(redis_url), max_queued=1000))
    catalog, metrics = open_catalog(settings), InProcessMetrics()
    planners, store = catalog.planners(), JobStore(settings.jobs, metrics)
    embeddings = EmbeddingCache(settings.cache, nobody, metrics, place="ingress")
    service = ImageService(
        models=catalog.drawn,
        fleet=Fleet(plan_placements(settings, catalog.drawn)),
        limits=settings.limits,
        jobs=store,
        planners=planners,
        prepare=nobody,
        results=open_store(settings.results, tmp_path),
        pools={},
        metrics=metrics,
        rules=settings.jobs,
    )
    texts = TextService(
        models=catalog.models,
        planners=planners,
        embeddings=embeddings,
        metrics=metrics,
        limits=settings.limits,
        cache_url=None,
    )
    with redis.Redis.from_url(redis_url) as client:
        async with listening(create_app(service, texts, settings, None)) as port:
            url = f"http://127.0.0.1:{port}"
            async with httpx.AsyncClient(base_url=url) as http:
                job = (await http.post("/v1/jobs", json=an_order())).json()["id"]
                hang_ups = HangUps(url, seed=1)
                await hang_ups.many(10, job)  # what is made once, the subscription for example, is there then
                await at_rest(client, job)
                before = len(asyncio.all_tasks())
                await hang_ups.many(HANG_UPS, job)
                await at_rest(client, job)
                async with asyncio.timeout(20):
                    while len(asyncio.all_tasks()) > before:  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
                await http.delete(f"/v1/jobs/{job}")
        await service.close()
    await store.check_integrity()
    await embeddings.close()
    await store.close()


async def at_rest(client: redis.Redis, job: str) -> None:
    """Nobody follows any job, and the one that is wanted is the only one that has not ended."""
    async with asyncio.timeout(30):
        while client.pubsub_channels("tandem:events:*") or client.zrange("tandem:deadlines", 0, -1) != [job.encode()]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
