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
from serve.domain import ImageRef, JobError, StepEvent, Tier, Timings
from serve.encoders.cache import EmbeddingCache
from serve.encoders.compose import compose
from serve.errors import ClientError, LeaseLost, TandemError, Unavailable
from serve.jobs.store import Claim, JobStore
from serve.jobs.sweeper import sweep
from serve.prompts.plan import Planner, PromptPlan
from serve.results.png import encode_png
from serve.results.store import ResultStore
from serve.settings import JobSettings

log = logging.getLogger(__name__)

IDLE_WAIT_S = 1.0
FIRST_RETRY_S = 0.25
LONGEST_RETRY_S = 5.0
T = TypeVar("T")


class Withdrawn(Exception):
    """The client cancelled the job, or another worker owns it now: nobody waits for this run."""


class GivenBack(Exception):
    """This replica is stopping and what the job needs next is away: the job returns to the queue."""


class Pulse:
    """Tells the store of a claimed job's progress and renews its lease, one message at a time.

    Steps that are made while a message is under way are told together by the next one. When the store says that the
    job was cancelled or taken over, `on_withdrawn` is called once and the pulse stops.

    Owns: the task that beats.
    """

    def __init__(self, jobs: JobStore, claim: Claim, heartbeat_s: float, on_withdrawn: Callable[[], None]) -> None:
        self._jobs = jobs
        self._claim = claim
        self._heartbeat_s = heartbeat_s
        self._on_withdrawn = on_withdrawn
        self._loop = asyncio.get_running_loop()
        self._stepped = asyncio.Event()
        self._step = 0
        self.withdrawn = False
        self._task = asyncio.create_task(self._beat())

    def on_step(self, event: StepEvent) -> None:
        """Called on the engine's thread."""
        self._loop.call_soon_threadsafe(self._note, event.step)

    async def stop(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def _note(self, step: int) -> None:
        self._step = step
        self._stepped.set()

    async def _beat(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stepped.wait(), self._heartbeat_s)
            self._stepped.clear()
            try:
                wanted = await self._jobs.renew(self._claim, self._step)
            except LeaseLost:
                wanted = False
            except Unavailable:
                continue  # the run goes on; its result is committed when the store is back
            if not wanted:
                self.withdrawn = True
                self._on_withdrawn()
                return


class Worker:
    """Claims while it has a free row, serves what it claimed, and on drain finishes that and claims no more.

    Owns: the tasks of the jobs it holds, its sweeper.
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
        self._held: dict[asyncio.Task[None], int] = {}
        self._freed = asyncio.Event()
        self._draining = asyncio.Event()
        self._claiming = asyncio.create_task(self._claim_until_drained())
        self._sweeping = asyncio.create_task(sweep(jobs))

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
        await self._claiming
        if self._held:
            await asyncio.wait(list(self._held))
        self._sweeping.cancel()
        await asyncio.to_thread(self._engine.stop)

    async def _claim_until_drained(self) -> None:
        """One claim at a time, and only for a free row: what this replica can't step yet, another may."""
        while not self._draining.is_set():
            if self.rows >= self._max_rows:
                await self._first(self._freed.wait())
                self._freed.clear()
                continue
            try:
                claim = await self._jobs.claim(self._name, [self._model])
            except TandemError as error:
                log.warning("claiming: %s", error.message)
                await self._first(asyncio.sleep(IDLE_WAIT_S))
                continue
            if claim is None:
                await self._first(self._jobs.wait_for_work(IDLE_WAIT_S))
                continue
            task = asyncio.create_task(self._serve(claim))
            self._held[task] = claim.request.num_images
            task.add_done_callback(self._release)

    async def _first(self, event: Awaitable[object]) -> None:
        """Wait for the event or for the drain."""
        tasks = [asyncio.ensure_future(event), asyncio.ensure_future(self._draining.wait())]
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _release(self, task: asyncio.Task[None]) -> None:
        del self._held[task]
        self._freed.set()

    async def _serve(self, claim: Claim) -> None:
        """Bring the claimed job to its end; whatever goes wrong here becomes the job's, never the replica's."""
        pulse = Pulse(self._jobs, claim, self._settings.heartbeat_s, lambda: self._engine.cancel(claim.job_id))
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
        plan = self._planner.plan(claim.request)
        fetched = await self._patiently(pulse, lambda: self._embeddings.get_many(plan.units))
        conditioning = compose(plan, {key: got.value for key, got in fetched.items()})
        text_s = time.monotonic() - started
        if pulse.withdrawn:
            raise Withdrawn
        future = self._engine.submit(Work(claim.job_id, claim.request, conditioning), pulse.on_step)
        try:
            rendered = await asyncio.wrap_future(future)
        except TandemError:
            if pulse.withdrawn:
                raise Withdrawn from None
            raise
        storing = time.monotonic()
        refs = await self._store(claim, pulse, rendered)
        timings = Timings(
            text_s=text_s,
            denoise_s=rendered.denoise_s,
            decode_s=rendered.decode_s,
            store_s=time.monotonic() - storing,
        )
        tiers = _tiers(plan, {key: got.tier for key, got in fetched.items()})
        await self._commit(pulse, lambda: self._jobs.succeed(claim, images=refs, cache=tiers, timings=timings))

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
        GivenBack when this replica has been told to stop.
        """
        delay_s = FIRST_RETRY_S
        while True:
            try:
                return await call()
            except Unavailable as error:
                if pulse.withdrawn:
                    raise Withdrawn from None
                if self._draining.is_set():
                    raise GivenBack from None
                log.warning("waiting: %s", error.message)
            await self._first(asyncio.sleep(delay_s))
            delay_s = min(2 * delay_s, LONGEST_RETRY_S)

    async def _commit(self, pulse: Pulse, write: Callable[[], Awaitable[None]]) -> None:
        """Write an outcome; a job that is another worker's by now is left to it.

        While the store is away, the outcome waits for it; when this replica has to stop meanwhile, the lease runs out
        and another draws the job again.
        """
        with contextlib.suppress(LeaseLost, Withdrawn, GivenBack):
            await self._patiently(pulse, write)


def _tiers(plan: PromptPlan, tiers: Mapping[str, Tier]) -> dict[str, Tier]:
    return {unit.key: tiers[unit.key] for unit in plan.units}


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
