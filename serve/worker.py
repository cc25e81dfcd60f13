"""The life of one diffusion replica: claim a job, have its text, draw it, store it, tell."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TypeVar

from PIL import Image

from serve.diffusion.engine import Engine, Rendered, Work
from serve.domain import Conditioning, ImageRef, JobError, Tier, Timings
from serve.encoders.cache import EmbeddingCache, Fetched
from serve.encoders.compose import compose
from serve.errors import ClientError, LeaseLost, TandemError, Unavailable
from serve.jobs.pulse import Pulse
from serve.jobs.store import Claim, JobStore
from serve.prompts.plan import Planner, PromptPlan
from serve.results.png import encode_png
from serve.results.store import ResultStore
from serve.settings import JobSettings
from serve.telemetry.metrics import Metrics
from serve.text import count_text

log = logging.getLogger(__name__)

IDLE_WAIT_S = 1.0
FIRST_RETRY_S = 0.25
LONGEST_RETRY_S = 5.0
T = TypeVar("T")


class Withdrawn(Exception):
    """The client cancelled the job, or another worker owns it now: nobody waits for this run."""


class GivenBack(Exception):
    """This replica is stopping and what the job needs next is away: the job returns to the queue."""


class Worker:
    """Claims while it has a free row, serves what it claimed, and on drain finishes that and claims no more.

    Owns: the tasks of the jobs it holds.
    """

    def __init__(
        self,
        *,
        name: str,
        model: str,
        max_rows: int,
        settings: JobSettings,
        jobs: JobStore,
        planner: Planner,
        embeddings: EmbeddingCache,
        engine: Engine,
        results: ResultStore,
        metrics: Metrics,
    ) -> None:
        self._name = name
        self._model = model
        self._max_rows = max_rows
        self._settings = settings
        self._jobs = jobs
        self._planner = planner
        self._embeddings = embeddings
        self._engine = engine
        self._results = results
        self._metrics = metrics
        self._held: dict[asyncio.Task[None], int] = {}
        self._freed = asyncio.Event()
        self._draining = asyncio.Event()
        self._claiming = asyncio.create_task(self._claim_until_drained())

    @property
    def healthy(self) -> bool:
        return self._engine.alive and (self._draining.is_set() or not self._claiming.done())

    @property
    def rows(self) -> int:
        """Images in hand."""
        return sum(self._held.values())

    async def drain(self) -> None:
        """Claim no more, finish what is in hand or give it back where its text or its store is away, end the engine."""
        self._draining.set()
        await asyncio.wait([self._claiming])
        if self._held:
            await asyncio.wait(list(self._held))
        await asyncio.to_thread(self._engine.stop)

    async def abandon(self) -> None:
        """Let go of everything at once, for a step loop that hangs: the leases run out, and other workers take over."""
        self._draining.set()
        tasks = [self._claiming, *self._held]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _claim_until_drained(self) -> None:
        """One claim at a time, and only for a free row: what this replica can't step yet, another may.

        A replica whose step loop has ended claims nothing: it would fail the whole queue, job by job.
        """
        while self._engine.alive and not self._draining.is_set():
            if self.rows >= self._max_rows:
                await self._unless_draining(self._freed.wait())
                self._freed.clear()
                continue
            try:
                claim = await self._jobs.claim(self._name, [self._model])
            except Exception as error:  # noqa: BLE001  what can't be claimed must not stop what is in hand
                log.warning("claiming: %s", error)
                await self._unless_draining(asyncio.sleep(IDLE_WAIT_S))
                continue
            if claim is None:
                await self._unless_draining(self._jobs.wait_for_work(IDLE_WAIT_S))
                continue
            task = asyncio.create_task(self._serve(claim))
            self._held[task] = claim.request.num_images
            task.add_done_callback(self._release)

    def _release(self, task: asyncio.Task[None]) -> None:
        del self._held[task]
        self._freed.set()

    async def _serve(self, claim: Claim) -> None:
        """Bring the claimed job to its end; whatever goes wrong here becomes the job's, never the replica's."""
        pulse = Pulse(self._jobs, claim, self._settings.heartbeat_s)
        try:
            await self._draw(claim, pulse)
        except Withdrawn:
            await self._commit(pulse, lambda: self._jobs.cancelled(claim))
        except GivenBack:
            await self._commit(pulse, lambda: self._jobs.release(claim))
        except Exception as error:  # noqa: BLE001
            await self._fail(claim, pulse, error)
        finally:
            await pulse.stop()

    async def _draw(self, claim: Claim, pulse: Pulse) -> None:
        started = time.monotonic()
        plan = self._planner.plan(claim.request.text)
        fetched = await self._text(pulse, plan)
        # In a thread: a T5's context is megabytes, and this loop keeps the leases of every job in hand.
        conditioning = await asyncio.to_thread(compose, plan, {key: got.value for key, got in fetched.items()})
        text_s = time.monotonic() - started
        self._metrics.observe("tandem_text_wait_seconds", text_s)
        rendered = await self._render(claim, pulse, conditioning)
        storing = time.monotonic()
        refs = await self._store(claim, pulse, rendered)
        timings = Timings(
            text_s=text_s,
            denoise_s=rendered.denoise_s,
            decode_s=rendered.decode_s,
            store_s=time.monotonic() - storing,
        )
        tiers = {key: got.tier for key, got in fetched.items()}
        await self._commit(pulse, lambda: self._succeed(claim, plan, refs, tiers, timings))

    async def _succeed(
        self,
        claim: Claim,
        plan: PromptPlan,
        refs: tuple[ImageRef, ...],
        tiers: Mapping[str, Tier],
        timings: Timings,
    ) -> None:
        cost = await self._jobs.succeed(claim, images=refs, cache=tiers, timings=timings)
        count_text(self._metrics, plan, cost)

    async def _render(self, claim: Claim, pulse: Pulse, conditioning: Conditioning) -> Rendered:
        run_id = f"{claim.job_id}:{claim.fence}"
        drawing = asyncio.wrap_future(self._engine.submit(Work(run_id, claim.request, conditioning), pulse.on_step))
        if not await _before(pulse.gone.wait(), drawing):
            return await drawing
        self._engine.cancel(run_id)
        with contextlib.suppress(TandemError):
            await drawing
        raise Withdrawn

    async def _store(self, claim: Claim, pulse: Pulse, rendered: Rendered) -> tuple[ImageRef, ...]:
        """Put every image; a later attempt of the same job writes the same bytes under the same keys."""
        refs = []
        for index, image in enumerate(rendered.images):
            data = await asyncio.to_thread(_png, claim, index, image)
            key = f"{claim.job_id}/{index}.png"
            await self._patiently(pulse, partial(self._results.put, key, data, "image/png"))
            refs.append(
                ImageRef(
                    index=index,
                    key=key,
                    seed=claim.request.seed + index,
                    width=image.width,
                    height=image.height,
                    content_type="image/png",
                    bytes=len(data),
                )
            )
        return tuple(refs)

    async def _fail(self, claim: Claim, pulse: Pulse, error: Exception) -> None:
        if isinstance(error, TandemError):
            log.error("job %s failed in attempt %d: %s", claim.job_id, claim.attempt, error.message)
            told = JobError(code=error.code, message=error.message)
        else:
            log.error("job %s failed in attempt %d", claim.job_id, claim.attempt, exc_info=error)
            told = JobError(code=TandemError.code, message="an internal error; the server's log has the details")
        retry = not isinstance(error, ClientError)
        await self._commit(pulse, lambda: self._jobs.fail(claim, told, retry=retry))

    async def _patiently(self, pulse: Pulse, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat a call while its backend is away, for as long as somebody waits for the job.

        The job's own timeout bounds this: an expired job's lease is gone, and its pulse says so. Raises Withdrawn, or
        GivenBack when this replica has been told to stop meanwhile.
        """
        delay_s = FIRST_RETRY_S
        while not pulse.gone.is_set():
            try:
                return await call()
            except Unavailable as error:
                log.warning("waiting: %s", error.message)
            if self._draining.is_set():
                raise GivenBack
            await self._unless_draining(_before(pulse.gone.wait(), asyncio.sleep(delay_s)))
            delay_s = min(2 * delay_s, LONGEST_RETRY_S)
        raise Withdrawn

    async def _text(self, pulse: Pulse, plan: PromptPlan) -> dict[str, Fetched]:
        """The plan's embeddings. A pool that is away may not even refuse, so the waiting itself can be called off."""
        asking = asyncio.create_task(self._patiently(pulse, lambda: self._embeddings.get_many(plan.units)))
        if not await _before(_either(pulse.gone, self._draining), asking):
            return await asking
        asking.cancel()
        raise Withdrawn if pulse.gone.is_set() else GivenBack

    async def _unless_draining(self, event: Awaitable[object]) -> None:
        """Wait for the event or for the drain."""
        await _before(self._draining.wait(), event)

    async def _commit(self, pulse: Pulse, write: Callable[[], Awaitable[None]]) -> None:
        """Write an outcome; a job that is another worker's by now is left to it.

        While the store is away, the outcome waits for it; when this replica has to stop meanwhile, the lease runs out
        and another draws the job again.
        """
        with contextlib.suppress(LeaseLost, Withdrawn, GivenBack):
            await self._patiently(pulse, write)


async def _either(one: asyncio.Event, other: asyncio.Event) -> None:
    await _before(one.wait(), other.wait())


async def _before(first: Awaitable[object], second: Awaitable[object]) -> bool:
    """Wait for either; whether it was the first. The other is cancelled, unless it is a future of somebody else's."""
    one, other = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        await asyncio.wait([one, other], return_when=asyncio.FIRST_COMPLETED)
        return one.done() and not other.done()
    finally:
        for waiting, given in ((one, first), (other, second)):
            if waiting is not given:
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)


def _png(claim: Claim, index: int, image: Image.Image) -> bytes:
    request = claim.request
    return encode_png(
        image,
        {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "model": request.model,
            "seed": request.seed + index,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "width": request.width,
            "height": request.height,
        },
    )
