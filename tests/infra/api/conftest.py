"""The native API on the real services, job store and result store.

The text encoder of jobs is away: they wait all the same. Embeddings have a real encoder pool over the shipped model.
"""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from support.captioners import describing
from support.jobs import ANY
from support.speaking import Speaking, speaking_on

from serve.api.app import create_app
from serve.domain.jobs import ImageRef
from serve.domain.text import EncodeUnit
from serve.embedded import EmbeddedRedis
from serve.encoders.cache import EmbeddingCache, Fetch, Fetched
from serve.encoders.forward import TextTower
from serve.encoders.pool import EncoderPool
from serve.encoders.registry import Encoder, register
from serve.errors import BackendUnavailable
from serve.jobs.store import Claim, JobStore
from serve.keys import KeyStore
from serve.models import resolve
from serve.placements import Fleet, plan_placements
from serve.prompts.plan import Planner
from serve.readiness import PoolState
from serve.results.keys import content_type
from serve.results.store import ResultStore, open_store
from serve.service import ImageService
from serve.settings.pools import ModelSettings
from serve.settings.stores import JobSettings
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics
from serve.telemetry.tracing import open_tracing
from serve.text import TextService

PNG = b"\x89PNG not really"
StandOn = Callable[..., AbstractAsyncContextManager["Stand"]]
Refused = Callable[[httpx.Response, int, str | None], dict[str, Any]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclasses.dataclass
class Stand:
    """The application and the parts behind it."""

    app: Any
    client: httpx.AsyncClient
    jobs: JobStore
    results: ResultStore
    pools: dict[str, PoolState]
    embeddings: EmbeddingCache
    encode: Fetch
    planner: Planner
    metrics: InProcessMetrics
    keys: KeyStore | None = None

    async def key(self, **terms: Any) -> dict[str, str]:
        """The header of a new key."""
        assert self.keys is not None
        return {"authorization": f"Bearer {(await self.keys.create('a key', **terms)).secret}"}

    async def create(self, **order: Any) -> dict[str, Any]:
        answer = await self.client.post("/v1/jobs", json={"prompt": "a red circle"} | order)
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        return job

    async def finish(self, job_id: str, steps: int = 2, data: bytes = PNG, extension: str = "png") -> None:
        """Claim the job, take its steps, store one image."""
        claim = await self.jobs.claim("test", ANY)
        assert isinstance(claim, Claim)
        assert claim.job_id == job_id
        for step in range(1, steps + 1):
            await self.jobs.renew(claim, step)
        key = f"{job_id}/0.{extension}"
        await self.results.put(key, data, content_type(key))
        ref = ImageRef(
            index=0,
            key=key,
            seed=claim.request.seed,
            width=64,
            height=64,
            content_type=content_type(key),
            bytes=len(data),
        )
        await self.jobs.succeed(claim, images=[ref], cache={}, timings=(await self.jobs.get(job_id)).timings)


@dataclasses.dataclass
class Pools:
    """The encoder pools of a registry, without their replicas: what carries units to the right one."""

    by_fingerprint: dict[str, EncoderPool]

    async def encode(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
        kinds = {unit.encoder: [other for other in units if other.encoder == unit.encoder] for unit in units}
        answers = await asyncio.gather(*(self.by_fingerprint[kind].encode(own) for kind, own in kinds.items()))
        found = {
            unit: got
            for own, answer in zip(kinds.values(), answers, strict=True)
            for unit, got in zip(own, answer, strict=True)
        }
        return [found[unit] for unit in units]

    async def close(self) -> None:
        for pool in self.by_fingerprint.values():
            await pool.close()


async def no_encoder(units: Sequence[EncodeUnit]) -> Any:
    raise BackendUnavailable("the text encoder does not answer")


@functools.cache
def tower(encoder: Encoder) -> TextTower:
    return TextTower.load(encoder, "cpu")


@contextlib.asynccontextmanager
async def _stand_on(url: str, folder: Path, **changes: Any) -> AsyncIterator[Stand]:
    """`changes` are settings: `cache`, `keys`, `webhooks`, `text_models`, ...; `jobs` (a dict of what differs) and
    `max_queued` of them; or `encoder_away`, `benchmark`. Keys are asked for where `keys.required` is true."""
    away = changes.pop("encoder_away", False)
    benchmark = changes.pop("benchmark", None)
    rules = {"max_queued": changes.pop("max_queued", 100)} | changes.pop("jobs", {})
    tree = Settings(data_dir=folder, jobs=JobSettings(redis_url=SecretStr(url), **rules), **changes)
    model = resolve(ModelSettings(), folder)
    others = [resolve(other, folder, text_only=True) for other in tree.text_models]
    models = {each.name: each for each in (model, *others)}
    registry = register(list(models.values()), tree)
    planners = {name: Planner(each, registry.sources(name)) for name, each in models.items()}
    metrics = InProcessMetrics()
    store = JobStore(tree.jobs, metrics)
    pools = {"text_encoder": PoolState(True, "1 replica"), "diffusion": PoolState(True, "1 replica")}

    async def probe_text() -> PoolState:
        return pools["text_encoder"]

    async def probe_diffusion() -> PoolState:
        return pools["diffusion"]

    service = ImageService(
        models={model.name: model},
        fleet=Fleet(plan_placements(tree, {model.name: model})),
        limits=tree.limits,
        jobs=store,
        planners=planners,
        prepare=no_encoder,
        results=open_store(tree.results, folder),
        pools={"text_encoder": probe_text, "diffusion": probe_diffusion},
        metrics=metrics,
        benchmark=benchmark,
        rules=tree.jobs,
        webhooks=tree.webhooks,
        prompts=tree.prompts,
    )
    encoders = Pools({each.fingerprint: EncoderPool(tower(each), each, tree, metrics) for each in registry.encoders})
    encode = no_encoder if away else encoders.encode
    embeddings = EmbeddingCache(tree.cache, encode, metrics, place="ingress")
    texts = TextService(
        models=models,
        planners=planners,
        embeddings=embeddings,
        metrics=metrics,
        limits=tree.limits,
        templates=tree.prompts.templates,
        cache_url=tree.cache.redis_url.get_secret_value() if tree.cache.redis_url else None,
    )
    keys = KeyStore(tree.jobs, metrics) if tree.keys.required else None
    tracing = open_tracing(tree.tracing, "ingress", "a test")
    async with (
        describing(tree, service.view, metrics) as captions,
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app := create_app(service, texts, tree, keys, tracing, captions)),
            base_url="http://test",
        ) as client,
    ):
        yield Stand(
            app,
            client,
            store,
            open_store(tree.results, folder),
            pools,
            embeddings,
            encode,
            planners[model.name],
            metrics,
            keys,
        )
    await service.close()
    if tracing is not None:
        await tracing.close()
    await embeddings.close()
    await encoders.close()
    if keys is not None:
        await keys.close()
    await store.close()


@pytest.fixture(scope="session")
def stand_on() -> StandOn:
    """Stands on a Redis URL and a folder, with changed settings."""
    return _stand_on


@pytest.fixture
async def stand(redis_url: str, tmp_path: Path) -> AsyncIterator[Stand]:
    async with _stand_on(redis_url, tmp_path) as stand:
        yield stand


@pytest.fixture(scope="module")
def speaking(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Speaking]:
    """A stand for the tests of one file, whose every order is drawn."""
    with speaking_on(_stand_on, redis_server.url, tmp_path_factory.mktemp("speaking")) as speaking:
        yield speaking


@pytest.fixture(scope="session")
def refused() -> Refused:
    def check(answer: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
        """The error of an answer that must have this status and name this field."""
        assert answer.status_code == status, answer.text
        assert answer.headers["x-request-id"]
        error: dict[str, Any] = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == param
        return error

    return check
