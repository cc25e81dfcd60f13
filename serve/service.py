"""The story of one request, as the ingress tells it: check, plan, log the job, have its text encoded meanwhile."""

from __future__ import annotations

import asyncio
import logging
import secrets
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from serve.domain import EncodeUnit, ImageRequest, Job, JobEvent
from serve.encoders.cache import Fetched
from serve.errors import InvalidRequest, JobNotFound, ModelNotFound, TandemError
from serve.jobs.events import follow
from serve.jobs.store import JobStore
from serve.models import ModelFolder
from serve.prompts.plan import Planner
from serve.results.store import ResultStore
from serve.settings import LimitSettings
from serve.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

MAX_SEED = 2**32 - 1
"""Seeds fit into 32 bits, so that every client language can hold them."""

T = TypeVar("T")
Encode = Callable[[Sequence[EncodeUnit]], Awaitable[Sequence[Fetched]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewImage:
    """An image order as a client writes it; None takes the model's or the server's default (a random seed)."""

    prompt: str
    negative_prompt: str = ""
    model: str | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    num_images: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A served model and the defaults of a request to it. Sizes are pixels, multiples of `size_multiple`."""

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
        encode: Encode,
        results: ResultStore,
        pools: Mapping[str, Probe],
        metrics: Metrics,
    ) -> None:
        self._model = model
        self._limits = limits
        self._jobs = jobs
        self._planner = planner
        self._encode = encode
        self._results = results
        self._pools = pools
        self._metrics = metrics
        self._ahead: set[asyncio.Task[None]] = set()

    def models(self) -> tuple[ModelInfo, ...]:
        return (
            ModelInfo(
                id=self._model.name,
                family=self._model.family,
                default_width=self._model.default_width,
                default_height=self._model.default_height,
                size_multiple=self._model.size_multiple,
                default_num_inference_steps=self._limits.default_num_inference_steps,
                default_guidance_scale=self._limits.default_guidance_scale,
            ),
        )

    async def submit(self, new: NewImage) -> Job:
        """Log the job durably and return it.

        Raises InvalidRequest or ModelNotFound (nothing was queued), QueueFull, BackendUnavailable.
        """
        request = self._complete(new)
        plan = self._planner.plan(request)
        job = await self._jobs.submit(uuid.uuid4().hex, request, truncated=plan.truncated)
        if plan.truncated:
            self._metrics.inc("tandem_truncated_prompts_total", len(plan.truncated))
        task = asyncio.create_task(self._encode_ahead(job.id, plan.units))
        self._ahead.add(task)
        task.add_done_callback(self._ahead.discard)
        return job

    async def get(self, job_id: str) -> Job:
        return await self._jobs.get(job_id)

    async def events(self, job_id: str, after: str | None = None) -> AsyncGenerator[JobEvent, None]:
        """The job's transitions and steps, from the first or after event id `after`, until it has ended."""
        await self._jobs.get(job_id)
        return follow(self._jobs, job_id, after)

    async def cancel(self, job_id: str) -> Job:
        return await self._jobs.cancel(job_id)

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
            fetched = await self._encode(units)
            tiers = {unit.key: got.tier for unit, got in zip(units, fetched, strict=True)}
            await self._jobs.note_ahead(job_id, tiers)
        except TandemError as error:
            log.warning("text of job %s could not be encoded ahead: %s", job_id, error.message)

    def _complete(self, new: NewImage) -> ImageRequest:
        limits, model = self._limits, self._model
        if new.model is not None and new.model != model.name:
            raise ModelNotFound(f"model {new.model!r} is not served here; this server has {model.name!r}", "model")
        if not new.prompt.strip():
            raise InvalidRequest("prompt is empty", "prompt")
        for field, text in (("prompt", new.prompt), ("negative_prompt", new.negative_prompt)):
            if len(text.encode()) > limits.max_prompt_bytes:
                raise InvalidRequest(f"{field} is longer than {limits.max_prompt_bytes} bytes", field)
        steps = _default(new.num_inference_steps, limits.default_num_inference_steps)
        guidance = _default(new.guidance_scale, limits.default_guidance_scale)
        seed = secrets.randbelow(MAX_SEED + 1) if new.seed is None else new.seed
        _within("num_inference_steps", steps, 1, limits.max_num_inference_steps)
        _within("guidance_scale", guidance, 0.0, limits.max_guidance_scale)
        _within("num_images", new.num_images, 1, limits.max_num_images)
        _within("seed", seed, 0, MAX_SEED)
        return ImageRequest(
            model=model.name,
            prompt=new.prompt,
            negative_prompt=new.negative_prompt,
            width=self._side("width", _default(new.width, model.default_width)),
            height=self._side("height", _default(new.height, model.default_height)),
            num_inference_steps=steps,
            guidance_scale=float(guidance),
            seed=seed,
            num_images=new.num_images,
        )

    def _side(self, field: str, pixels: int) -> int:
        grid, largest = self._model.size_multiple, self._limits.max_side
        _within(field, pixels, grid, largest)
        if pixels % grid:
            below = pixels - pixels % grid
            raise InvalidRequest(
                f"{field} {pixels} is not a multiple of {grid}; the nearest are {below} and {below + grid}", field
            )
        return pixels


def _default(value: T | None, default: T) -> T:
    return default if value is None else value


def _within(field: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # also refuses NaN
        raise InvalidRequest(f"{field} must be between {least} and {most}", field)
