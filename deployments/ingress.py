"""The HTTP ingress: the same FastAPI application that runs under plain ASGI in the tests, inside Serve."""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Mapping

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.handles import DiffusionClients
from deployments.parts import cache_url, open_parts, open_text
from serve.api.app import create_app
from serve.jobs.sweeper import sweep
from serve.placements import Fleet, plan_placements
from serve.service import ImageService, PoolState
from serve.settings import Settings
from serve.text import TextService


class Ingress:
    """Any replica answers for any job: all state is in the job store.

    Owns: the services, the embeddings in this process, and the sweeper: it is the one part that lives even when no
    worker does.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, encoders: Mapping[str, DeploymentHandle], diffusion: Mapping[str, DeploymentHandle]
    ) -> None:
        """`encoders` by fingerprint; `diffusion` by placement, none on a server that only encodes text."""
        parts = await open_parts(settings)
        catalog = parts.catalog
        planners = await asyncio.to_thread(catalog.planners)
        fleet = Fleet(plan_placements(settings, catalog.drawn))
        clients = DiffusionClients(diffusion, fleet)

        async def queue_state() -> PoolState:
            return PoolState(True, f"{await parts.jobs.queue_depth()} waiting")

        async def result_state() -> PoolState:
            await parts.results.check()
            return PoolState(True, settings.results.store)

        self._settings = settings
        self._jobs = parts.jobs
        self._sweeping = asyncio.create_task(sweep(parts.jobs, settings.jobs.lease_s))
        self._text = open_text(settings, parts, encoders, "ingress", f"{platform.node()}:{os.getpid()}")
        self._service = ImageService(
            models=catalog.drawn,
            fleet=fleet,
            limits=settings.limits,
            jobs=parts.jobs,
            planners=planners,
            prepare=self._text.clients.prepare,
            results=parts.results,
            pools={"jobs": queue_state, "results": result_state} | self._text.clients.probes | clients.probes,
            metrics=parts.metrics,
            benchmark=clients.benchmark if diffusion and settings.http.offers_benchmark else None,
        )
        self._texts = TextService(
            models=catalog.models,
            planners=planners,
            embeddings=self._text.embeddings,
            metrics=parts.metrics,
            limits=settings.limits,
            cache_url=cache_url(settings),
        )

    async def __del__(self) -> None:
        """Serve awaits this before it ends the process."""
        self._sweeping.cancel()
        await self._service.close()
        await self._text.close()
        await self._jobs.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this after the constructor."""
        app = create_app(self._service, self._texts, self._settings)
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
