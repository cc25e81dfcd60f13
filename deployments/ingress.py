"""The HTTP ingress: the same FastAPI application that runs under plain ASGI in the tests, inside Serve."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.handles import DiffusionClient, EncoderClient
from deployments.metrics import RayMetrics
from serve.api.app import create_app
from serve.encoders.unit import fingerprint
from serve.jobs.store import JobStore
from serve.jobs.sweeper import sweep
from serve.models import resolve
from serve.prompts.plan import Planner
from serve.prompts.tokenizers import PromptTokenizer
from serve.results.store import open_store
from serve.service import ImageService, PoolState
from serve.settings import Settings
from serve.telemetry import logs


class Ingress:
    """Any replica answers for any job: all state is in the job store.

    Owns: the ImageService, and a sweeper, so that overdue jobs end even when no diffusion replica lives.
    """

    async def __init__(self, settings: Settings, encoder: DeploymentHandle, diffusion: DeploymentHandle) -> None:  # type: ignore[misc]  # Serve awaits it
        logs.configure(settings.log.level)
        model = await asyncio.to_thread(resolve, settings.model, settings.data_dir)
        encoder_print = await asyncio.to_thread(fingerprint, model.path, settings.encoder.dtype)
        metrics = RayMetrics()
        jobs = JobStore(settings.jobs, metrics)
        results = open_store(settings.results, settings.data_dir)
        encoders = EncoderClient(encoder)

        async def queue_state() -> PoolState:
            await jobs.ping()
            return PoolState(True, f"{await jobs.queue_depth()} waiting")

        async def result_state() -> PoolState:
            await results.check()
            return PoolState(True, settings.results.store)

        self._settings = settings
        self._sweeping = asyncio.create_task(sweep(jobs))
        self._service = ImageService(
            model=model,
            limits=settings.limits,
            jobs=jobs,
            planner=Planner(PromptTokenizer(model.path), encoder_print),
            encode=encoders.encode,
            results=results,
            pools={
                "jobs": queue_state,
                "results": result_state,
                "text-encoder": encoders.ready,
                "diffusion": DiffusionClient(diffusion).ready,
            },
            metrics=metrics,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this after the constructor."""
        app = create_app(self._service, self._settings)
        app.add_middleware(LeaveRequestId)
        return app


class LeaveRequestId:
    """Serve's proxy gives every request its id and every answer the same `x-request-id`; a second one would be ours."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def once(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self._app(scope, receive, once)
