"""The story of one request, as the ingress tells it: take the order in, have its text encoded while it waits, answer
for the job to its owner."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.ahead import Ahead, Prepare
from serve.callers import Caller, Limit
from serve.domain.jobs import ImageRef, Job, JobEvent, JobState
from serve.domain.orders import Arrival
from serve.encoders.cache import EmbeddingCache
from serve.errors import ClientError, JobNotFound, Unavailable
from serve.fleet import PlaceInfo, place_info
from serve.inputs import Inputs
from serve.jobs.calls import Calls
from serve.jobs.events import end_of, follow
from serve.jobs.store import JobStore
from serve.jobs.terms import JobPage, Submitted
from serve.models import ModelFolder
from serve.models.quality import quality_steps
from serve.offers import ModelInfo, SelfTest, model_info, step_times
from serve.once import Once
from serve.options import Options, Style, kept, read, styles_of
from serve.orders import NewImage, drawn, size_of, within
from serve.placements import Fleet
from serve.prompts.plan import Planner
from serve.readiness import PoolState, Probe, Readiness
from serve.results.keys import content_type
from serve.results.store import ResultStore
from serve.settings.front import WebhookSettings
from serve.settings.orders import LimitSettings, PromptSettings
from serve.settings.stores import JobSettings
from serve.submission import ASK_AGAIN_S, Intake, Quote
from serve.telemetry.metrics import Metrics, count_stage
from serve.text import count_prompts

MAX_MEASURED_STEPS = 50

Benchmark = Callable[[str, int, int, int], Awaitable[Mapping[str, Mapping[int, Sequence[float]]]]]
"""(model, width, height, steps) -> by placement, the seconds of each of so many synthetic steps by batch entries."""


class NotOffered(ClientError):
    """The operator has not switched this on."""

    code = "not_offered"


class Busy(Unavailable):
    """One at a time, and it is being done."""

    code = "busy"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredImage:
    """Either a URL that the client may fetch for a while, or the bytes themselves."""

    content_type: str
    url: str | None = None
    data: bytes | None = None


class ImageService:
    """Submit, look up, follow and cancel image jobs. Another owner's job is one that there is not.

    Owns: the way in, and the tasks that cancel what nobody waits for.
    """

    def __init__(
        self,
        *,
        models: Mapping[str, ModelFolder],
        fleet: Fleet,
        limits: LimitSettings,
        jobs: JobStore,
        planners: Mapping[str, Planner],
        prepare: Prepare,
        results: ResultStore,
        pools: Mapping[str, Probe],
        metrics: Metrics,
        benchmark: Benchmark | None = None,
        rules: JobSettings = JobSettings(),
        webhooks: WebhookSettings = WebhookSettings(),
        prompts: PromptSettings = PromptSettings(),
        embeddings: EmbeddingCache | None = None,
    ) -> None:
        """`models` are those that are drawn, by name; the first is the default. `benchmark` is None where the operator
        does not offer it. `embeddings` is this process's cache."""
        self._models = models
        self._fleet = fleet
        self._limits = limits
        self._jobs = jobs
        self._results = results
        self._readiness = Readiness(pools)
        self._metrics = metrics
        self._templates = prompts.templates
        self._benchmark = benchmark
        self._measuring = asyncio.Lock()
        self._inputs = Inputs(jobs, results, limits)
        self._door = Intake(models, fleet, limits, rules, webhooks, jobs, self._inputs, planners, prompts.templates)
        self._ahead = Ahead(jobs, prepare, embeddings)
        self._withdrawing: set[asyncio.Task[None]] = set()

    @property
    def calls(self) -> Calls:
        """What callers have under way of synchronous calls that take several jobs."""
        return self._jobs

    @property
    def max_num_images(self) -> int:
        """Most pictures of one order."""
        return self._limits.max_num_images

    def models(self) -> tuple[ModelInfo, ...]:
        """What images can be ordered from; empty on a server that only encodes text."""
        return tuple(model_info(*drawn(name, self._models), self._fleet, self._limits) for name in self._models)

    async def fleet(self) -> tuple[PlaceInfo, ...]:
        """What each placement was planned to hold, and how its replicas do. Raises BackendUnavailable."""
        places = self._fleet.placements
        return tuple([place_info(each, (await self._jobs.crew(each.model)).reports) for each in places])

    async def submit(
        self, new: NewImage, caller: Caller = Caller(), once: Once | None = None, arrival: Arrival | None = None
    ) -> Submitted:
        """Log the job durably and return it; what it starts from is stored before. With `once`, an order that was
        logged before under its id is the same job. `arrival` is that of the order.

        Raises InvalidRequest, ModelNotFound, or JobNotFound where a picture that the order names is gone (nothing was
        queued or kept); QueueFull, RateLimited, BackendUnavailable; with `once` Conflict, JobGone, and JobNotFound for
        an id that is another owner's.
        """
        accepted = await self._door.submit(new, caller, once, arrival)
        if accepted.plan is not None:
            job_id = accepted.submitted.job.id
            count_prompts(self._metrics, accepted.plan)
            request = accepted.submitted.job.request
            if request.template is not None:
                self._metrics.inc("tandem_template_orders_total", template=request.template, arm=request.arm or "")
            if (admission_s := accepted.submitted.job.timings.admission_s) is not None:
                count_stage(self._metrics, "admission", admission_s)
            self._ahead.begin(job_id, accepted.plan.units)
        return accepted.submitted

    async def cut_out(self, new: NewImage, field: str, caller: Caller) -> bytes | None:
        """A mask for `submit`, as a PNG: white where the picture in the order's field, `image` or `mask`, is
        transparent. None where it nowhere is. Raises as `submit` does for an order that has no place in the queue, or
        whose picture can't be read."""
        await self._door.look(new, caller)
        return await self._inputs.cut_out(field, getattr(new, field), caller.owner)

    async def view(self, field: str, text: str, owner: str, most: int) -> bytes:
        """A picture for a model to look at, as `Inputs.picture` has it."""
        return await self._inputs.picture(field, text, owner, most)

    def quality_steps(self, model: str | None) -> Mapping[str, int]:
        """Denoising steps by a word of quality. Raises ModelNotFound."""
        _, denoiser = drawn(model, self._models)
        return quality_steps(denoiser.default_num_inference_steps, self._limits.max_num_inference_steps)

    async def quote(self, new: NewImage, caller: Caller) -> Quote:
        """What the order would come to now; nothing is queued, kept or charged. Raises as `submit` does, but for
        QueueFull, which the answer tells."""
        return await self._door.quote(new, caller)

    async def close(self) -> None:
        self._door.close()
        self._ahead.close()
        self._readiness.close()
        for task in self._withdrawing:
            task.cancel()

    async def get(self, job_id: str, caller: Caller) -> Job:
        return await self._jobs.get(job_id, caller.owner)

    async def jobs(self, caller: Caller, states: Sequence[JobState], after: str | None, count: int) -> JobPage:
        """The caller's jobs, newest first. Raises InvalidRequest for an `after` that is no cursor."""
        return await self._jobs.jobs(caller.owner, states=states, after=after, count=count)

    async def limits(self, caller: Caller) -> tuple[Limit, ...]:
        """What is left of the caller's allowance; empty where it has no bounds."""
        return await self._jobs.limits(caller.owner, caller.allowance)

    async def options(self, caller: Caller) -> Options:
        """What the caller has set for orders in A1111's dialect."""
        return kept(await self._jobs.options(caller.owner), tuple(self._models))

    async def set_options(self, caller: Caller, given: Mapping[str, Any]) -> None:
        """Options that there are not are passed over. Raises InvalidRequest, ModelNotFound."""
        await self._jobs.set_options(caller.owner, read(given, tuple(self._models)))

    def styles(self) -> dict[str, Style]:
        """The templates that A1111's clients can use, by name."""
        return styles_of(self._templates)

    async def wait(self, job_id: str, state: JobState) -> Job:
        """The job when it has ended; for who has just ordered it, and was told that it is in `state`. Raises
        JobNotFound or BackendUnavailable; the job goes on."""
        return await end_of(self._jobs, job_id, state)

    async def events(
        self, job_id: str, caller: Caller, after: str | None = None, *, previews: bool = True
    ) -> AsyncGenerator[JobEvent, None]:
        """The job's transitions and steps, from the first or after event id `after`, until it has ended."""
        await self._jobs.get(job_id, caller.owner)
        return follow(self._jobs, job_id, after, previews=previews)

    async def cancel(self, job_id: str, caller: Caller | None = None) -> Job:
        """None: whoever's job it is."""
        job = await self._jobs.cancel(job_id, None if caller is None else caller.owner)
        self._ahead.cancel(job_id)
        return job

    async def withdraw(self, job_id: str, within_s: float) -> None:
        """Cancel a job that nobody waits for. While the job store is away this goes on in the background, for at most
        `within_s`."""
        try:
            await self.cancel(job_id)
        except Unavailable:
            task = asyncio.create_task(self._cancel_later(job_id, within_s))
            self._withdrawing.add(task)
            task.add_done_callback(self._withdrawing.discard)
        except JobNotFound:
            pass  # it ended long ago

    async def image(self, job_id: str, name: str, caller: Caller) -> StoredImage:
        """`name` is the index of an image that was drawn, or `image` or `mask`: what the job starts from."""
        key = await self._inputs.key(job_id, name, caller.owner)
        url = self._results.url(key)
        return StoredImage(content_type=content_type(key), url=url, data=None if url else await self._results.get(key))

    def signed_url(self, ref: ImageRef) -> str | None:
        """Where the picture of a job can be fetched for a while without a key; None where the store can't say."""
        return self._results.url(ref.key)

    async def picture(self, job_id: str, name: str, caller: Caller) -> bytes:
        """The file itself, wherever it is kept; `name` as in `image`."""
        return await self._results.get(await self._inputs.key(job_id, name, caller.owner))

    async def benchmark(
        self, model: str | None = None, width: int | None = None, height: int | None = None, steps: int = 5
    ) -> SelfTest:
        """Time synthetic steps of a model on one replica of each placement, between the steps of its jobs.

        Raises NotOffered, Busy, InvalidRequest, ModelNotFound, BackendUnavailable, GenerationFailed.
        """
        if self._benchmark is None:
            raise NotOffered("this server does not offer its benchmark (http.benchmark)")
        folder, denoiser = drawn(model, self._models)
        within("num_inference_steps", steps, 1, MAX_MEASURED_STEPS)
        size = NewImage(width=width, height=height)
        width, height = size_of(size, folder, denoiser, self._fleet, self._limits)
        if self._measuring.locked():
            raise Busy("a benchmark is running", retry_after_s=10.0)
        async with self._measuring:
            found = await self._benchmark(folder.name, width, height, steps)
        tables = {name: tuple(step_times(denoiser, measured)) for name, measured in found.items()}
        return SelfTest(model=folder.name, width=width, height=height, steps=steps, placements=tables)

    async def readiness(self) -> dict[str, PoolState]:
        """What each part says of itself."""
        return await self._readiness.states()

    async def _cancel_later(self, job_id: str, within_s: float) -> None:
        with contextlib.suppress(TimeoutError, JobNotFound):
            async with asyncio.timeout(within_s):
                while True:
                    await asyncio.sleep(ASK_AGAIN_S)
                    with contextlib.suppress(Unavailable):
                        await self.cancel(job_id)
                        return
