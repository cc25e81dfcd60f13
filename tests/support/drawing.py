"""A server that draws, for clients that know nothing of event loops: the real application under uvicorn, its stores,
the shipped model's text encoder and one diffusion worker, all in a thread of their own, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import SecretStr
from support.captioners import describing
from support.house import open_house, parts
from support.listening import listening

from serve.api.app import create_app
from serve.embedded import EmbeddedRedis
from serve.encoders.cache import EmbeddingCache
from serve.encoders.concepts import ConceptFolder
from serve.jobs.store import JobStore
from serve.keys import KeyStore
from serve.placements import Fleet, plan_placements
from serve.readiness import PoolState
from serve.service import ImageService
from serve.settings.stores import JobSettings
from serve.settings.tree import Settings
from serve.text import TextService

T = TypeVar("T")


@dataclass(frozen=True)
class Drawing:
    """Where it listens, and its job store, on the loop of its thread."""

    url: str
    settings: Settings
    jobs: JobStore
    keys: KeyStore | None
    loop: asyncio.AbstractEventLoop

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """On the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def key(self, **terms: Any) -> str:
        """The secret of a new key."""
        assert self.keys is not None
        return self.run(self.keys.create("a key", **terms)).secret


@contextlib.contextmanager
def drawing_server(redis_url: str, *, worker: bool = True, **settings: Any) -> Iterator[Drawing]:
    """`settings` are rooms of the settings, `jobs` a dict of what differs there. Without `worker` jobs stay queued."""
    ready: Future[tuple[Drawing, asyncio.Event]] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(ready, redis_url, worker, settings)))
    thread.start()
    server, over = ready.result(60)
    try:
        yield server
    finally:
        server.loop.call_soon_threadsafe(over.set)
        thread.join()


async def _serve(ready: Future[Any], redis_url: str, worker: bool, settings: dict[str, Any]) -> None:
    try:
        await _served(ready, redis_url, worker, settings)
    except BaseException as error:
        if ready.done():
            raise
        ready.set_exception(error)


async def _served(ready: Future[Any], redis_url: str, worker: bool, settings: dict[str, Any]) -> None:
    rules = settings.pop("jobs", {})
    over = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tree = Settings(data_dir=folder, jobs=JobSettings(redis_url=SecretStr(redis_url), **rules), **settings)
        house = await stack.enter_async_context(open_house(redis_url, folder, lease_s=10.0, **rules))
        if worker:
            await stack.enter_async_context(house.worker())
        model = parts().model
        models, planners = {model.name: model}, {model.name: house.planner}
        embeddings = EmbeddingCache(tree.cache, house.encode, house.metrics, place="ingress")
        stack.push_async_callback(embeddings.close)

        async def prepare(units: Any) -> Any:
            found = await embeddings.get_many(units)
            return [found[unit.key].tier for unit in units]

        async def probe() -> PoolState:
            return PoolState(True, "1 replica")

        service = ImageService(
            models=models,
            fleet=Fleet(plan_placements(tree, models)),
            limits=tree.limits,
            jobs=house.jobs,
            planners=planners,
            prepare=prepare,
            results=house.results,
            pools={"text_encoder": probe, "diffusion": probe},
            metrics=house.metrics,
            rules=tree.jobs,
            webhooks=tree.webhooks,
            prompts=tree.prompts,
            embeddings=embeddings,
        )
        stack.push_async_callback(service.close)
        texts = TextService(
            models=models,
            planners=planners,
            embeddings=embeddings,
            metrics=house.metrics,
            limits=tree.limits,
            templates=tree.prompts.templates,
            cache_url=None,
            concepts=ConceptFolder(tree.concept_folder),
        )
        keys = KeyStore(tree.jobs, house.metrics) if tree.keys.required else None
        if keys is not None:
            stack.push_async_callback(keys.close)
        captions = await stack.enter_async_context(describing(tree, service.view, house.metrics))
        app = create_app(service, texts, tree, keys, describing=captions)
        port = await stack.enter_async_context(listening(app))
        server = Drawing(f"http://127.0.0.1:{port}", tree, house.jobs, keys, asyncio.get_running_loop())
        ready.set_result((server, over))
        await over.wait()


@contextlib.contextmanager
def a_redis() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedRedis(Path(folder), "jobs")
        server.start()
        try:
            yield server.url
        finally:
            server.stop()
