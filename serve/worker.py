"""The life of one diffusion replica: claim a job, have its text, draw it, store it, tell."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

from serve.diffusion.engine import Engine, Rendered, Work
from serve.domain import ImageRequest, JobError, Schedule, Timings
from serve.encoders.cache import EmbeddingCache
from serve.encoders.compose import compose
from serve.errors import ClientError, LeaseLost, TandemError
from serve.jobs.pulse import Pulse
from serve.jobs.store import Claim, JobStore
from serve.patience import GivenBack, Patience, Withdrawn, first
from serve.placements import Placement
from serve.prompts.plan import Planner
from serve.results.store import ResultStore
from serve.settings import JobSettings
from serve.storing import fetch_input, store_images
from serve.telemetry.metrics import Metrics
from serve.text import count_text
from serve.wants import wants_of

log = logging.getLogger(__name__)

IDLE_WAIT_S = 1.0


class Worker:
    """Claims while it may hold more, serves what it claimed, and on drain finishes that and claims no more.

    Owns: the tasks of the jobs it holds.
    """

    def __init__(
        self,
        *,
        name: str,
        placement: Placement,
        settings: JobSettings,
        jobs: JobStore,
        planner: Planner,
        embeddings: EmbeddingCache,
        engine: Engine,
        results: ResultStore,
        metrics: Metrics,
        batch: Callable[[], int],
    ) -> None:
        """`batch` says how many images fill a step, as far as that is known by now."""
        self._name = name
        self._placement = placement
        self._settings = settings
        self._jobs = jobs
        self._planner = planner
        self._embeddings = embeddings
        self._engine = engine
        self._results = results
        self._metrics = metrics
        self._batch = batch
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
        """One claim at a time, for what this replica wants with the rows it has in hand just then.

        A replica whose step loop has ended claims nothing: it would fail the whole queue, job by job.
        """
        while self._engine.alive and not self._draining.is_set():
            self._freed.clear()
            wants = wants_of(self._placement, self.rows, self._batch())
            if not wants:
                await first(self._freed.wait(), self._draining.wait())
                continue
            try:
                claim = await self._jobs.claim(self._name, wants)
            except Exception as error:  # noqa: BLE001  what can't be claimed must not stop what is in hand
                log.warning("claiming: %s", error)
                await first(asyncio.sleep(IDLE_WAIT_S), self._draining.wait())
                continue
            if claim is None:
                wait_s = min([IDLE_WAIT_S, *(want.waited_s for want in wants if want.waited_s)])
                await first(self._jobs.wait_for_work(wait_s), self._freed.wait(), self._draining.wait())
                continue
            task = asyncio.create_task(self._serve(claim))
            self._held[task] = claim.request.num_images
            task.add_done_callback(self._release)

    def _release(self, task: asyncio.Task[None]) -> None:
        del self._held[task]
        self._freed.set()

    async def _serve(self, claim: Claim) -> None:
        """Bring the claimed job to its end; whatever goes wrong here becomes the job's, never the replica's.

        A job that is another worker's by now is left to it. While the store is away, the outcome waits for it; when
        this replica has to stop meanwhile, the lease runs out and another draws the job again.
        """
        pulse = Pulse(self._jobs, claim, self._settings.heartbeat_s)
        patience = Patience(pulse.gone, self._draining)
        try:
            settle = await self._outcome(claim, pulse, patience)
            with contextlib.suppress(LeaseLost, Withdrawn, GivenBack):
                await patience.repeat(settle)
        finally:
            await pulse.stop()

    async def _outcome(self, claim: Claim, pulse: Pulse, patience: Patience) -> Callable[[], Awaitable[None]]:
        """Draw the job as far as it goes. The settlement of the claim that this comes to."""
        try:
            return await self._draw(claim, pulse, patience)
        except Withdrawn:
            return partial(self._jobs.cancelled, claim)
        except GivenBack:
            return partial(self._jobs.release, claim)
        except TandemError as error:
            log.error("job %s failed in attempt %d: %s", claim.job_id, claim.attempt, error.message)
            told = JobError(code=error.code, message=error.message)
            return partial(self._jobs.fail, claim, told, retry=not isinstance(error, ClientError))
        except Exception:
            log.exception("job %s failed in attempt %d", claim.job_id, claim.attempt)
            told = JobError(code=TandemError.code, message="an internal error; the server's log has the details")
            return partial(self._jobs.fail, claim, told, retry=True)

    async def _draw(self, claim: Claim, pulse: Pulse, patience: Patience) -> Callable[[], Awaitable[None]]:
        request, started = claim.request, time.monotonic()
        plan = self._planner.plan(request.text)
        fetched = await patience.obtain(lambda: self._embeddings.get_many(plan.units))
        # In a thread: a T5's context is megabytes, and this loop keeps the leases of every job in hand.
        conditioning = await asyncio.to_thread(compose, plan, {key: got.value for key, got in fetched.items()})
        text_s = time.monotonic() - started
        self._metrics.observe("tandem_text_wait_seconds", text_s)
        image = await fetch_input(self._results, "image", request.image, patience)
        mask = await fetch_input(self._results, "mask", request.mask, patience)
        work = Work(f"{claim.job_id}:{claim.fence}", request, Schedule.constant(conditioning), image, mask)
        rendered = await self._render(work, pulse, patience)
        storing = time.monotonic()
        refs = await store_images(self._results, claim, rendered, patience)
        store_s = time.monotonic() - storing
        timings = Timings(text_s=text_s, denoise_s=rendered.denoise_s, decode_s=rendered.decode_s, store_s=store_s)
        tiers = {key: got.tier for key, got in fetched.items()}

        async def succeed() -> None:
            cost = await self._jobs.succeed(
                claim, images=refs, cache=tiers, timings=timings, approximate=rendered.approximate
            )
            count_text(self._metrics, plan, cost)
            log.info("job drawn", extra={"job": claim.job_id, **_performance(request, timings)})

        return succeed

    async def _render(self, work: Work, pulse: Pulse, patience: Patience) -> Rendered:
        on_preview = pulse.on_preview if work.request.preview_every else None
        drawing = asyncio.wrap_future(self._engine.submit(work, pulse.on_step, on_preview))
        try:
            return await patience.finish(drawing)
        except Withdrawn:
            self._engine.cancel(work.run_id)
            with contextlib.suppress(TandemError):
                await drawing
            raise


def _performance(request: ImageRequest, timings: Timings) -> dict[str, object]:
    """What the log says of a job that was drawn: what was asked for, and the milliseconds of each stage."""
    asked = {
        "model": request.model,
        "images": request.num_images,
        "size": f"{request.width}x{request.height}",
        "steps": request.num_inference_steps,
    }
    stages = {
        "text": timings.text_s,
        "denoise": timings.denoise_s,
        "decode": timings.decode_s,
        "store": timings.store_s,
    }
    return asked | {f"{name}_ms": round(1e3 * took) for name, took in stages.items() if took is not None}
