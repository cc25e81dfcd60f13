"""What the ingress and the diffusion replicas both stand on."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from deployments.metrics import RayMetrics
from serve.encoders.unit import fingerprint
from serve.jobs.store import JobStore
from serve.models import ModelFolder, resolve
from serve.prompts.plan import Planner
from serve.prompts.tokenizers import PromptTokenizer
from serve.results.store import ResultStore, open_store
from serve.settings import Settings
from serve.telemetry import logs


@dataclass(frozen=True, slots=True)
class Parts:
    metrics: RayMetrics
    model: ModelFolder
    planner: Planner
    jobs: JobStore
    results: ResultStore


async def open_parts(settings: Settings) -> Parts:
    """The same in every process: the same text gives the same units, whoever plans it."""
    logs.configure(settings.log.level)
    metrics = RayMetrics()
    model = await asyncio.to_thread(resolve, settings.model, settings.data_dir)
    encoder = await asyncio.to_thread(fingerprint, model.path, settings.encoder.dtype)
    return Parts(
        metrics=metrics,
        model=model,
        planner=Planner(PromptTokenizer(model.path), encoder),
        jobs=JobStore(settings.jobs, metrics),
        results=open_store(settings.results, settings.data_dir),
    )
