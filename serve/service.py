"""The story of one request, as the ingress tells it: check, plan, log the job, have its text encoded meanwhile."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from serve.domain import EncodeUnit, Job, JobEvent, Tier
from serve.errors import JobNotFound, TandemError
from serve.jobs.events import follow
from serve.jobs.store import JobStore
from serve.models import ModelFolder
from serve.orders import NewImage, complete
from serve.prompts.plan import Planner
from serve.results.store import ResultStore
from serve.settings import LimitSettings
from serve.telemetry.metrics import Metrics
from serve.text import count_prompts

log = logging.getLogger(__name__)

Prepare = Callable[[Sequence[EncodeUnit]], Awaitable[Sequence[Tier]]]
"""Has units encoded and kept where the replica that claims the job will find them; where each came from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model that is drawn with, and the defaults of an order. Sizes are pixels, multiples of `size_multiple`."""

    id: str
    family: str
    default_width: int
    default_height: int
    size_multiple: int
    default_num_inference_steps: int
    default_guidance_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredImage:
    """Either a URL that the client may fetch for a while, or the bytes themselves."""

    content_type: str
    url: str | None = None
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class PoolState:
    ready: bool
    detail: str


Probe = Callable[[], Awaitable[PoolState]]


class ImageService:
    """Submit, look up, follow and cancel image jobs.

    Owns: the tasks that have a queued job's text encoded.
    """

    def __init__(
        self,
        *,
        model: ModelFolder,
        limits: LimitSettings,
        jobs: JobStore,
        planner: Planner,
        prepare: Prepare,
        results: ResultStore,
        pools: Mapping[str, Probe],
        metrics: Metrics,
    ) -> None:
        self._model = model
        self._limits = limits
        self._jobs = jobs
        self._planner = planner
        self._prepare = prepare
        self._results = results
        self._pools = pools
        self._metrics = metrics
        self._ahead: dict[str, asyncio.Task[None]] = {}

    def models(self) -> tuple[ModelInfo, ...]:
        """What images can be ordered from; empty on a server that only encodes text."""
        denoiser = self._model.denoiser
        if denoiser is None:
            return ()
        return (
            ModelInfo(
                id=self._model.name,
                family=self._model.family,
                default_width=denoiser.default_width,
                default_height=denoiser.default_height,
                size_multiple=denoiser.size_multiple,
                default_num_inference_steps=self._limits.default_num_inference_steps,
                default_guidance_scale=self._limits.default_guidance_scale,
            ),
        )

    async def submit(self, new: NewImage) -> Job:
        """Log the job durably and return it.

        Raises InvalidRequest or ModelNotFound (nothing was queued), QueueFull, BackendUnavailable.
        """
        request = complete(new, self._model, self._limits)
        plan = self._planner.plan(request.text)
        job = await self._jobs.submit(uuid.uuid4().hex, request, truncated=plan.truncated)
        count_prompts(self._metrics, plan)
        task = self._ahead[job.id] = asyncio.create_task(self._encode_ahead(job.id, plan.units))
        task.add_done_callback(lambda _: self._ahead.pop(job.id, None))
        return job

    async def close(self) -> None:
        """The text of queued jobs is left to the replicas that claim them."""
        for task in list(self._ahead.values()):
            task.cancel()

    async def get(self, job_id: str) -> Job:
        return await self._jobs.get(job_id)

    async def events(self, job_id: str, after: str | None = None) -> AsyncGenerator[JobEvent, None]:
        """The job's transitions and steps, from the first or after event id `after`, until it has ended."""
        await self._jobs.get(job_id)
        return follow(self._jobs, job_id, after)

    async def cancel(self, job_id: str) -> Job:
        job = await self._jobs.cancel(job_id)
        if ahead := self._ahead.get(job_id):
            ahead.cancel()
        return job

    async def image(self, job_id: str, index: int) -> StoredImage:
        job = await self._jobs.get(job_id)
        for ref in job.images:
            if ref.index == index:
                url = self._results.url(ref.key)
                data = None if url else await self._results.get(ref.key)
                return StoredImage(content_type=ref.content_type, url=url, data=data)
        raise JobNotFound(f"job {job_id} is {job.state} and has no image {index}", "index")

    async def readiness(self) -> dict[str, PoolState]:
        """What each part says of itself; a part that fails to answer is not ready."""
        states = await asyncio.gather(*(self._probe(probe) for probe in self._pools.values()))
        return dict(zip(self._pools, states, strict=True))

    async def _probe(self, probe: Probe) -> PoolState:
        try:
            return await asyncio.wait_for(probe(), timeout=2.0)
        except TimeoutError:
            return PoolState(False, "does not answer")
        except TandemError as error:
            return PoolState(False, error.message)

    async def _encode_ahead(self, job_id: str, units: Sequence[EncodeUnit]) -> None:
        """Failure costs time only: the replica that claims the job asks again."""
        try:
            tiers = await self._prepare(units)
            await self._jobs.note_ahead(job_id, {unit.key: tier for unit, tier in zip(units, tiers, strict=True)})
        except TandemError as error:
            log.warning("text of job %s could not be encoded ahead: %s", job_id, error.message)
