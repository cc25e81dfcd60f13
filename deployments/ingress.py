"""The HTTP ingress: the same FastAPI application that runs under plain ASGI in the tests, inside Serve."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

import ray
from fastapi import FastAPI
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.handles import CaptionClient, DiffusionClients
from deployments.parts import Parts, cache_url, open_parts, open_text
from serve.api.app import create_app
from serve.api.job_schemas import webhook_body
from serve.captions.service import CaptionService
from serve.domain import Job
from serve.errors import BackendUnavailable, OperatorError
from serve.jobs.gauges import Place, QueueGauges, tell_gauges
from serve.jobs.store import JobStore
from serve.jobs.sweeper import sweep
from serve.keys import KeyStore
from serve.placements import Fleet, plan_placements
from serve.readiness import PoolState
from serve.service import ImageService
from serve.settings import Settings
from serve.telemetry.tracing import open_tracing
from serve.text import TextService
from serve.webhooks import Deliverer

log = logging.getLogger(__name__)

TELL_AGAIN_S = 30.0
"""How often the settings of jobs are told, so that a job store that was away or emptied has them again."""
BEGIN_AGAIN_S = 1.0
"""When a chore that broke is begun again."""


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

        async def queue_state() -> PoolState:
            return PoolState(True, f"{await parts.jobs.queue_depth()} waiting")

        async def result_state() -> PoolState:
            await parts.results.check()
            return PoolState(True, settings.results.store)

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
            pools={"jobs": queue_state, "results": result_state} | self._text.clients.probes | clients.probes | probes,
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
        wanted = {
            Place(each.model, each.name, each.gpu_class): each.settings.least_replicas for each in fleet.placements
        }
        gauges = QueueGauges(parts.jobs, parts.metrics, wanted)
        chores: dict[str, Callable[[], Awaitable[None]]] = {
            "the sweeper": lambda: sweep(parts.jobs, parts.results, settings.jobs.lease_s),
            "telling the settings": lambda: tell_rules(parts.jobs),
            "telling the gauges": lambda: tell_gauges(gauges),
        }
        if self._keys is not None and settings.keys.first is not None:
            chores["keeping the first key"] = partial(
                keep_first_key, self._keys, settings.keys.first.get_secret_value()
            )
        if settings.webhooks.allowed_hosts:
            chores["calling webhooks"] = lambda: _deliverer(settings, parts).run()
        tasks = [asyncio.create_task(kept_up(name, chore)) for name, chore in chores.items()]
        self._open.push_async_callback(_ended, tasks)
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


def carried(app: FastAPI) -> FastAPI:
    """The application with what it takes to be carried by Serve."""
    app.add_middleware(LeaveRequestId)
    app.add_middleware(HangUps)  # the outermost: all that receives is to hear of them
    return app


async def kept_up(name: str, chore: Callable[[], Awaitable[None]]) -> None:
    """Do what is to go on until this is cancelled: a chore that ends or breaks is begun again."""
    while True:
        try:
            await chore()
            log.error("%s has ended, and is begun again", name)
        except Exception:
            log.exception("%s has broken, and is begun again", name)
        await asyncio.sleep(BEGIN_AGAIN_S)


async def tell_rules(jobs: JobStore) -> None:
    """Tell the settings of jobs now and then, until cancelled; first what Redis is not set up for."""
    for doubt in await jobs.doubts():
        log.warning("jobs.redis_url: %s: accepted jobs may be lost with this Redis", doubt)
    while True:
        try:
            await jobs.tell_rules()
        except BackendUnavailable as error:
            log.warning("the operator's commands can't be told the settings of jobs yet: %s", error.message)
        await asyncio.sleep(TELL_AGAIN_S)


async def keep_first_key(keys: KeyStore, token: str) -> None:
    """Make the settings' first key now and then, until cancelled: a job store that was away or emptied has it again."""
    told: str | None = None
    while True:
        pause_s = TELL_AGAIN_S
        try:
            doubt = await keys.make_first(token)
            if doubt != told and doubt is not None:
                log.warning("keys.first opens nothing: %s", doubt)
            told = doubt
        except BackendUnavailable:
            pause_s = BEGIN_AGAIN_S
        await asyncio.sleep(pause_s)


def tell_places(settings: Settings) -> None:
    """Tell where pictures may be looked for on the wrong node."""
    if settings.results.store != "local" or not ray.is_initialized():
        return
    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1:
        log.warning("results.store: local: all %d nodes must share data_dir, %s", nodes, settings.data_dir)


async def _ended(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


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


def _deliverer(settings: Settings, parts: Parts) -> Deliverer:
    root = settings.webhooks.public_url.rstrip("/")

    def body(job: Job) -> bytes:
        return webhook_body(job, root)

    return Deliverer(parts.jobs, settings.webhooks, body, parts.metrics)


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


class HangUps:
    """A client who hangs up is told of as ASGI has it. Serve lets an exception out of `receive` where its own question
    to the proxy was cancelled with the request, or the proxy is gone: either way nobody is left to be answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = False

        async def heard() -> Message:
            nonlocal gone
            if not gone:
                try:
                    return await receive()
                except RayError:
                    gone = True  # Serve says nothing more, and who asks again would wait for ever
            return {"type": "http.disconnect"}

        await self._app(scope, heard if scope["type"] == "http" else receive, send)
