"""The HTTP ingress: the same FastAPI application that runs under plain ASGI in the tests, inside Serve."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
from collections.abc import Mapping

import ray
from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from deployments.carried import carried
from deployments.chores import Chores
from deployments.handles import CaptionClient, DiffusionClients
from deployments.parts import Parts, cache_url, open_parts, open_text
from serve.api.app import create_app
from serve.captions.service import CaptionService
from serve.errors import BackendUnavailable, OperatorError
from serve.keys import KeyStore
from serve.placements import Fleet, plan_placements
from serve.readiness import PoolState, Probe
from serve.service import ImageService
from serve.settings.tree import Settings
from serve.telemetry.tracing import open_tracing
from serve.text import TextService

log = logging.getLogger(__name__)


class Ingress:
    """Any replica answers for any job: all state is in the job store.

    Owns: the services, the API keys as it has read them, the embeddings in this process, and what goes on even when no
    worker lives: the sweeper, whoever calls the webhooks, and who tells the operator's commands the settings.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        settings: Settings,
        encoders: Mapping[str, DeploymentHandle],
        diffusion: Mapping[str, DeploymentHandle],
        captions: DeploymentHandle | None = None,
    ) -> None:
        """`encoders` by fingerprint; `diffusion` by placement, none on a server that only encodes text; `captions`
        where they are offered.

        Raises OperatorError that names `keys.required` where nobody could pass, `webhooks.secret` where nobody could
        check who calls.
        """
        self._open = contextlib.AsyncExitStack()
        parts = await open_parts(settings)
        self._open.push_async_callback(parts.jobs.close)
        tell_places(settings)
        self._keys = await _open_keys(settings, parts)
        if self._keys is not None:
            self._open.push_async_callback(self._keys.close)
        name = f"{platform.node()}:{os.getpid()}"
        self._tracing = open_tracing(settings.tracing, "ingress", name)
        if self._tracing is not None:
            self._open.push_async_callback(self._tracing.close)
        catalog = parts.catalog
        planners = await asyncio.to_thread(catalog.planners)
        fleet = Fleet(plan_placements(settings, catalog.drawn))
        clients = DiffusionClients(diffusion, fleet)
        describing = None if captions is None else CaptionClient(captions, settings.captions)
        probes = {} if describing is None else {describing.name: describing.ready}
        self._settings = settings
        self._metrics = parts.metrics
        self._text = open_text(settings, parts, encoders, "ingress", name)
        self._open.push_async_callback(self._text.close)
        self._service = ImageService(
            models=catalog.drawn,
            fleet=fleet,
            limits=settings.limits,
            jobs=parts.jobs,
            planners=planners,
            prepare=self._text.clients.prepare,
            results=parts.results,
            pools=stores(parts) | self._text.clients.probes | clients.probes | probes,
            metrics=parts.metrics,
            benchmark=clients.benchmark if diffusion and settings.http.offers_benchmark else None,
            rules=settings.jobs,
            webhooks=settings.webhooks,
            prompts=settings.prompts,
            embeddings=self._text.embeddings,
        )
        self._open.push_async_callback(self._service.close)
        self._captions: CaptionService | None = None
        if describing is not None:
            own, view = settings.captions, self._service.view
            self._captions = CaptionService(own.model, own, settings.limits, view, describing.caption)
        chores = Chores(settings, parts, fleet, self._keys)
        self._open.push_async_callback(chores.close)
        self._texts = TextService(
            models=catalog.models,
            planners=planners,
            embeddings=self._text.embeddings,
            metrics=parts.metrics,
            limits=settings.limits,
            templates=settings.prompts.templates,
            concepts=catalog.concepts,
            cache_url=cache_url(settings),
        )

    def check_health(self) -> None:
        """Serve asks every few seconds; one that does not answer is replaced."""
        self._metrics.tell_again()

    async def __del__(self) -> None:
        """Serve awaits this before it ends the process, also where the constructor has raised."""
        await self._open.aclose()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this after the constructor."""
        return carried(
            create_app(self._service, self._texts, self._settings, self._keys, self._tracing, self._captions)
        )


def stores(parts: Parts) -> dict[str, Probe]:
    """Their `ready`, by name."""

    async def jobs() -> PoolState:
        return PoolState(True, f"{await parts.jobs.queue_depth()} waiting")

    async def results() -> PoolState:
        await parts.results.check()
        return PoolState(True, parts.results.kind)

    return {"jobs": jobs, "results": results}


def tell_places(settings: Settings) -> None:
    """Tell where pictures may be looked for on the wrong node."""
    if settings.results.store != "local" or not ray.is_initialized():
        return
    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1:
        log.warning("results.store: local: all %d nodes must share data_dir, %s", nodes, settings.data_dir)


async def _open_keys(settings: Settings, parts: Parts) -> KeyStore | None:
    """None where no key is asked for: only `tandem up` on loopback leaves them out by default."""
    if settings.keys.required is False:
        return None
    keys = KeyStore(settings.jobs, parts.metrics)
    first = settings.keys.first
    try:
        if first is not None:
            await keys.make_first(first.get_secret_value())
        made = await keys.ever_made()
    except BackendUnavailable as error:
        # A replica that starts meanwhile asks for keys all the same.
        log.warning("whether there are API keys is not known: %s", error.message)
        return keys
    if not made:
        await keys.close()
        raise OperatorError(
            "keys.required: there are no API keys; make one with `tandem keys create`, or set keys.required to false "
            "where whoever reaches the server may use it",
            "keys.required",
        )
    return keys
