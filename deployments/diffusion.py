"""The diffusion replicas. They take no requests: a Worker pulls jobs from the store."""

from __future__ import annotations

import asyncio
import os
import platform
import uuid
from collections.abc import Mapping

from ray.serve.handle import DeploymentHandle

from deployments.metrics import tell_device
from deployments.parts import open_parts, open_text
from serve.diffusion.engine import Engine
from serve.diffusion.runner import open_runner
from serve.diffusion.scheduler import StepScheduler
from serve.prompts.plan import Planner
from serve.settings import Settings
from serve.worker import Worker


class Diffusion:
    """One denoiser on one device, or a fraction of it.

    Owns: the Engine, and the Worker that feeds it.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, encoders: Mapping[str, DeploymentHandle]
    ) -> None:
        parts = await open_parts(settings)
        model = parts.catalog.drawn
        runner = await asyncio.to_thread(open_runner, model, settings.diffusion)
        max_rows = settings.diffusion.max_batch_size
        name = f"{platform.node()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._stall_s = settings.diffusion.stall_s
        self._metrics = parts.metrics
        self._jobs = parts.jobs
        self._text = open_text(settings, parts, encoders, "diffusion", name)
        self._engine = Engine(runner, StepScheduler(max_rows), parts.metrics)
        self._worker = Worker(
            name=name,
            model=model.name,
            max_rows=max_rows,
            settings=settings.jobs,
            jobs=parts.jobs,
            planner=Planner(model, parts.catalog.registry.sources(model.name)),
            embeddings=self._text.embeddings,
            engine=self._engine,
            results=parts.results,
            metrics=parts.metrics,
        )

    def describe(self) -> str:
        return f"{self._worker.rows} images in hand"

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        tell_device(self._metrics, "diffusion")
        if not self._worker.healthy:
            raise RuntimeError("the step loop or the claim loop has ended")
        if self._stalled:
            raise RuntimeError(f"a step has taken more than {self._stall_s:.0f} s")

    async def __del__(self) -> None:
        """Serve awaits this before it ends the process, for as long as the deployment's grace."""
        await (self._worker.abandon() if self._stalled else self._worker.drain())
        await self._text.close()
        await self._jobs.close()

    @property
    def _stalled(self) -> bool:
        return self._engine.busy_s > self._stall_s
