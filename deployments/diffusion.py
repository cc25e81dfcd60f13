"""The diffusion replicas. They take no requests: a Worker pulls jobs from the store."""

from __future__ import annotations

import asyncio
import os
import platform
import uuid

from ray.serve.handle import DeploymentHandle

from deployments.handles import EncoderClient
from deployments.metrics import RayMetrics
from serve.diffusion.engine import Engine
from serve.diffusion.runner import open_runner
from serve.diffusion.scheduler import StepScheduler
from serve.encoders.cache import EmbeddingCache
from serve.encoders.unit import fingerprint
from serve.jobs.store import JobStore
from serve.models import resolve
from serve.prompts.plan import Planner
from serve.prompts.tokenizers import PromptTokenizer
from serve.results.store import open_store
from serve.settings import Settings
from serve.telemetry import logs
from serve.worker import Worker


class Diffusion:
    """One denoiser on one device, or a fraction of it.

    Owns: the Engine, and the Worker that feeds it.
    """

    async def __init__(self, settings: Settings, encoder: DeploymentHandle) -> None:  # type: ignore[misc]  # Serve awaits it
        logs.configure(settings.log.level)
        metrics = RayMetrics()
        model = await asyncio.to_thread(resolve, settings.model, settings.data_dir)
        runner = await asyncio.to_thread(open_runner, model, settings.diffusion)
        max_rows = settings.diffusion.max_batch_size
        engine = Engine(runner, StepScheduler(max_rows), metrics)
        encoder_print = await asyncio.to_thread(fingerprint, model.path, settings.encoder.dtype)
        self._jobs = JobStore(settings.jobs, metrics)
        self._embeddings = EmbeddingCache(settings.cache, EncoderClient(encoder).encode, metrics)
        self._worker = Worker(
            name=f"{platform.node()}:{os.getpid()}:{uuid.uuid4().hex[:8]}",
            model=model.name,
            max_rows=max_rows,
            settings=settings.jobs,
            jobs=self._jobs,
            planner=Planner(PromptTokenizer(model.path), encoder_print),
            embeddings=self._embeddings,
            engine=engine,
            results=open_store(settings.results, settings.data_dir),
        )

    def describe(self) -> str:
        return f"{self._worker.rows} images in hand"

    def check_health(self) -> None:
        if not self._worker.healthy:
            raise RuntimeError("the step loop or the claim loop has ended")

    async def __del__(self) -> None:
        """Serve awaits this before it ends the process, for as long as the deployment's grace."""
        await self._worker.drain()
        await self._embeddings.close()
        await self._jobs.close()
