"""What the ingress and the diffusion replicas both stand on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from ray.serve.handle import DeploymentHandle

from deployments.handles import EncoderClients
from deployments.metrics import RayMetrics
from serve.catalog import Catalog, open_catalog
from serve.embedded import check_redis_url
from serve.encoders.cache import EmbeddingCache
from serve.encoders.census import CensusTaker
from serve.jobs.store import JobStore
from serve.results.store import ResultStore, open_store
from serve.settings.tree import Settings
from serve.telemetry import logs


@dataclass(frozen=True, slots=True)
class Parts:
    metrics: RayMetrics
    catalog: Catalog
    jobs: JobStore
    results: ResultStore


async def open_parts(settings: Settings, placement: str = "") -> Parts:
    """The same in every process: the same text gives the same units, whoever plans it. `placement` is that of a
    diffusion replica."""
    logs.configure(settings.log.level)
    check_urls(settings)
    metrics = RayMetrics(placement, settings.placement_named(placement).gpu_class if placement else None)
    return Parts(
        metrics=metrics,
        catalog=await asyncio.to_thread(open_catalog, settings),
        jobs=JobStore(settings.jobs, metrics),
        results=open_store(settings.results, settings.data_dir),
    )


def check_urls(settings: Settings) -> None:
    """OperatorError, with nothing of the URL in it. Each process has them from its own environment, and redis-py would
    quote what it can't read."""
    for setting, url in (("jobs.redis_url", settings.jobs.redis_url), ("cache.redis_url", settings.cache.redis_url)):
        if url is not None:
            check_redis_url(url.get_secret_value(), setting)


@dataclass(frozen=True, slots=True)
class TextParts:
    """The pools, the embeddings that this process has of them, and who reports those."""

    clients: EncoderClients
    embeddings: EmbeddingCache
    census: CensusTaker

    async def close(self) -> None:
        await self.census.close()
        await self.embeddings.close()


def open_text(
    settings: Settings, parts: Parts, encoders: Mapping[str, DeploymentHandle], place: str, name: str
) -> TextParts:
    """`encoders` by fingerprint. `place` is the kind of this process, `name` tells it from others of its kind."""
    registry = parts.catalog.registry
    clients = EncoderClients(encoders, registry.encoders, lambda: embeddings.redis_away)
    embeddings = EmbeddingCache(
        settings.cache,
        clients.encode,
        parts.metrics,
        place=place,
        private=[each.fingerprint for each in registry.encoders if not each.settings.redis],
    )
    census = CensusTaker(embeddings, cache_url(settings), name)
    census.start()
    return TextParts(clients, embeddings, census)


def cache_url(settings: Settings) -> str | None:
    return settings.cache.redis_url.get_secret_value() if settings.cache.redis_url else None
