"""The native API on the real service, job store and result store. The text encoder is away: jobs wait all the same."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from serve.api.app import create_app
from serve.domain import EncodeUnit, ImageRef
from serve.encoders.cache import Fetched
from serve.encoders.unit import fingerprint
from serve.errors import BackendUnavailable
from serve.jobs.store import JobStore
from serve.models import resolve
from serve.prompts.plan import Planner
from serve.prompts.tokenizers import PromptTokenizer
from serve.results.store import ResultStore, open_store
from serve.service import ImageService, PoolState
from serve.settings import JobSettings, ModelSettings, Settings
from serve.telemetry.metrics import InProcessMetrics

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

    async def create(self, **order: Any) -> dict[str, Any]:
        answer = await self.client.post("/v1/jobs", json={"prompt": "a red circle"} | order)
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        return job

    async def finish(self, job_id: str, steps: int = 2) -> None:
        """Claim the job, take its steps, store one image."""
        claim = await self.jobs.claim("test", ["shapes"])
        assert claim is not None
        assert claim.job_id == job_id
        for step in range(1, steps + 1):
            await self.jobs.renew(claim, step)
        key = f"{job_id}/0.png"
        await self.results.put(key, PNG, "image/png")
        ref = ImageRef(
            index=0,
            key=key,
            seed=claim.request.seed,
            width=64,
            height=64,
            content_type="image/png",
            bytes=len(PNG),
        )
        await self.jobs.succeed(claim, images=[ref], cache={}, timings=(await self.jobs.get(job_id)).timings)


async def no_encoder(units: Sequence[EncodeUnit]) -> Sequence[Fetched]:
    raise BackendUnavailable("the text encoder does not answer")


@contextlib.asynccontextmanager
async def _stand_on(url: str, folder: Path, **changes: Any) -> AsyncIterator[Stand]:
    """`changes` are settings: `max_queued` of the jobs, `results`."""
    jobs = JobSettings(redis_url=SecretStr(url), max_queued=changes.pop("max_queued", 100))
    tree = Settings(data_dir=folder, jobs=jobs, **changes)
    model = resolve(ModelSettings(), folder)
    store = JobStore(tree.jobs, InProcessMetrics())
    pools = {"text_encoder": PoolState(True, "1 replica"), "diffusion": PoolState(True, "1 replica")}

    async def probe_text() -> PoolState:
        return pools["text_encoder"]

    async def probe_diffusion() -> PoolState:
        return pools["diffusion"]

    service = ImageService(
        model=model,
        limits=tree.limits,
        jobs=store,
        planner=Planner(PromptTokenizer(model.path), fingerprint(model.path, "float32")),
        encode=no_encoder,
        results=open_store(tree.results, folder),
        pools={"text_encoder": probe_text, "diffusion": probe_diffusion},
        metrics=InProcessMetrics(),
    )
    app = create_app(service, tree)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield Stand(app, client, store, open_store(tree.results, folder), pools)
    await store.close()


@pytest.fixture(scope="session")
def stand_on() -> StandOn:
    """Stands on a Redis URL and a folder, with changed settings."""
    return _stand_on


@pytest.fixture
async def stand(redis_url: str, tmp_path: Path) -> AsyncIterator[Stand]:
    async with _stand_on(redis_url, tmp_path) as stand:
        yield stand


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
