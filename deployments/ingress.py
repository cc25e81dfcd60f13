"""The HTTP ingress: the same FastAPI application that runs under plain ASGI in the tests, inside Serve."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.handles import DiffusionClient, EncoderClient
from deployments.parts import open_parts
from serve.api.app import create_app
from serve.jobs.sweeper import sweep
from serve.service import ImageService, PoolState
from serve.settings import Settings


class Ingress:
    """Any replica answers for any job: all state is in the job store.

    Owns: the ImageService, and the sweeper: it is the one part that lives even when no worker does.
    """

    async def __init__(self, settings: Settings, encoder: DeploymentHandle, diffusion: DeploymentHandle) -> None:  # type: ignore[misc]  # Serve awaits it
        parts = await open_parts(settings)
        encoders = EncoderClient(encoder)

        async def queue_state() -> PoolState:
            return PoolState(True, f"{await parts.jobs.queue_depth()} waiting")

        async def result_state() -> PoolState:
            await parts.results.check()
            return PoolState(True, settings.results.store)

        self._settings = settings
        self._sweeping = asyncio.create_task(sweep(parts.jobs, settings.jobs.lease_s))
        self._service = ImageService(
            model=parts.model,
            limits=settings.limits,
            jobs=parts.jobs,
            planner=parts.planner,
            encode=encoders.encode,
            results=parts.results,
            pools={
                "jobs": queue_state,
                "results": result_state,
                "text-encoder": encoders.ready,
                "diffusion": DiffusionClient(diffusion).ready,
            },
            metrics=parts.metrics,
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
