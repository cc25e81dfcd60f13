"""One attempt at one claimed job: its text, its images, their files, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from serve.account import Account
from serve.aside import read_aside
from serve.diffusion.engine import Engine, Rendered, Work
from serve.diffusion.start import work_of
from serve.domain.jobs import JobError, JobState, MemoryReport, StepEvent, Timings
from serve.domain.orders import ImageRequest
from serve.domain.text import Tier
from serve.encoders.cache import EmbeddingCache
from serve.encoders.compose import compose
from serve.errors import ClientError, LeaseLost, NotFinite, OutOfMemory, TandemError
from serve.jobs.pulse import Pulse
from serve.jobs.store import Claim, JobStore
from serve.patience import GivenBack, Patience, Withdrawn, first
from serve.prompts.plan import Planner
from serve.relief import Cards, Fortune
from serve.reports import Pace
from serve.results.store import ResultStore
from serve.settings.stores import JobSettings
from serve.spool import Spool
from serve.stages import stages
from serve.storing import Outcome, encode_images, fetch_input, put_images, stored_before
from serve.telemetry.metrics import Metrics, count_stage
from serve.telemetry.tracing import SUCCEEDED, Attributes, Tracing
from serve.text import count_text

log = logging.getLogger(__name__)

Settlement = Callable[[], Awaitable[object]]

RETRIED: Mapping[type[BaseException], bool] = {
    ClientError: False,  # what is wrong with an order stays wrong
    NotFinite: False,  # the same seed comes to the same numbers
    Exception: True,  # memory, a device, a part of the server that is away, whatever nobody thought of
}
"""Whether a job that failed of this is started again, `jobs.retry_backoff_s` later and as long as attempts remain. The
nearest class counts."""


def retried(error: Exception) -> bool:
    return next(RETRIED[kind] for kind in type(error).__mro__ if kind in RETRIED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What all attempts of a replica share. `cost_of` predicts a request's milliseconds by what the replica knows now,
    `cards` says what it has of its card, and what others have.
    `draining` has them give back what has not begun, `leaving` whatever is not finished. `freed` is set when images in
    hand no longer count."""

    settings: JobSettings
    jobs: JobStore
    planner: Planner
    embeddings: EmbeddingCache
    engine: Engine
    results: ResultStore
    spool: Spool
    pace: Pace
    cost_of: Callable[[Pace, ImageRequest], float]
    metrics: Metrics
    cards: Cards
    tracing: Tracing | None = None
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    freed: asyncio.Event = field(default_factory=asyncio.Event)
    releasing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Attempt:
    """Brings a claimed job to its end; whatever goes wrong on the way becomes the job's, never the replica's.

    A job that is another worker's by now is left to it. While the job store is away the outcome waits for it; when this
    replica has to leave meanwhile, the lease runs out and another worker finds the images that were stored.

    Its images count against the replica until they are drawn and the spool has them. One that the spool has no room for
    counts until it is stored, so that a replica whose result store is away claims no more in the end.
    """

    def __init__(self, means: Means, claim: Claim) -> None:
        self.claim = claim
        self.rows = claim.request.num_images
        self._means = means
        self._run_id = f"{claim.job_id}:{claim.fence}"
        self._account = Account(claim)
        self._fortune = Fortune(claim.memory)
        self._ends = "released"
        self._rendering = self._ran_out = False
        self._moved_at = 0.0
        means.pace.began(self._run_id, self.rows, partial(means.cost_of, means.pace, claim.request))
        self._pulse = Pulse(means.jobs, claim, means.settings.heartbeat_s, lambda: means.pace.in_hand)
        # A drain gives back what has not begun; what is drawn is worth waiting for, for as long as there is time.
        self._beginning = Patience(self._pulse.gone, means.draining)
        self._ending = Patience(self._pulse.gone, means.leaving)

    @property
    def still_s(self) -> float:
        """Seconds since the step loop last moved this job on, or could not because it moved weights down the memory
        ladder; 0 where the loop has not got it."""
        since = max(self._moved_at, self._means.engine.moving_until)
        return time.monotonic() - since if self._rendering else 0.0

    async def run(self) -> None:
        try:
            settle = await self._outcome()
            with contextlib.suppress(LeaseLost, Withdrawn, GivenBack):
                await self._ending.repeat(settle)
                self._trace()
        except Exception:  # the lease runs out, and another worker takes the job
            log.exception("job %s could not be settled", self.claim.job_id)
        finally:
            self._free(drawn=False)
            await self._pulse.stop()

    async def _outcome(self) -> Settlement:
        """The settlement of the claim that this comes to, at once when the replica leaves: whatever hangs, be it the
        step loop, is not waited for."""
        drawing = asyncio.create_task(self._drawn())
        try:
            if await first(drawing, self._means.leaving.wait()) is drawing:
                return await drawing
        finally:
            drawing.cancel()
        self._means.engine.cancel(self._run_id)
        return self._cancelled() if self._pulse.gone.is_set() else self._release

    async def _drawn(self) -> Settlement:
        """The same, once the job has come as far as it can."""
        jobs, claim = self._means.jobs, self.claim
        memory: MemoryReport | None = None
        try:
            return await self._draw()
        except Withdrawn:
            return self._cancelled()
        except GivenBack:
            return self._release
        except TandemError as error:
            log.error("job %s failed in attempt %d: %s", claim.job_id, claim.attempt, error.message)
            told, retry = JobError(code=error.code, message=error.message), retried(error)
            if self._ran_out and claim.attempt < self._means.settings.max_attempts:
                memory = self._fortune.gives_back(self._means.cards, claim.request.pixels)
        except Exception as error:
            log.exception("job %s failed in attempt %d", claim.job_id, claim.attempt)
            told = JobError(code=TandemError.code, message="an internal error; the server's log has the details")
            retry = retried(error)
        self._ends = "retried" if retry and claim.attempt < self._means.settings.max_attempts else "failed"
        memory = memory or self._fortune.news
        delay_s = self._means.settings.retry_backoff_s
        return partial(jobs.fail, claim, told, retry=retry, delay_s=delay_s, memory=memory)

    def _cancelled(self) -> Settlement:
        self._ends = "cancelled"
        return partial(self._means.jobs.cancelled, self.claim)

    def _trace(self) -> None:
        """Once it is settled."""
        if self._means.tracing is not None:
            told: Attributes = {"tandem.job": self.claim.job_id, "tandem.attempt": self.claim.attempt}
            self._means.tracing.attempt(
                self.claim.trace,
                self._account.so_far,
                since_s=self._account.since_s,
                outcome=self._ends,
                request=self.claim.request,
                attributes=told,
            )

    async def _release(self) -> None:
        """One after the other: the last thing that a process does should need no new connection for each job."""
        async with self._means.releasing:
            await self._means.jobs.release(self.claim)

    async def _draw(self) -> Settlement:
        means, claim, request, account = self._means, self.claim, self.claim.request, self._account
        account.begin()
        before = await stored_before(means.results, claim, self._beginning)
        if before is not None:
            account.found()
            return partial(self._succeed, before, {}, self._fortune.news)
        text = request.text
        plan = await read_aside(text.characters, lambda: means.planner.plan(text))
        fetched = await self._beginning.obtain(lambda: means.embeddings.get_many(plan.units))
        # In a thread: a T5's context is megabytes, and this loop keeps the leases of every job in hand.
        schedule = await asyncio.to_thread(compose, plan, {key: got.value for key, got in fetched.items()})
        text_s = account.composed(got.tier for got in fetched.values())
        if (slowest := account.timings.text_from) is not None:
            means.metrics.observe("tandem_text_wait_seconds", text_s, tier=slowest)
        image = await fetch_input(means.results, "image", request.image, self._beginning)
        mask = await fetch_input(means.results, "mask", request.mask, self._beginning)
        rendered = await self._render(await asyncio.to_thread(work_of, self._run_id, request, schedule, image, mask))
        self._pulse.enter(JobState.STORING)
        account.drawn(rendered.spent, fetched=image is not None)
        means.pace.decoded(request.pixels * request.num_images, rendered.spent.vae_s)
        encoded, rung = await encode_images(claim, rendered, self._ending), rendered.rung
        account.compressed()
        del rendered, image, mask, schedule  # megabytes, and the store may be away for long
        with means.spool.room(encoded.nbytes) as spooled:
            if spooled:
                self._free(drawn=True)
            kept = await put_images(means.results, claim, encoded, self._ending, means.metrics)
        self._free(drawn=True)
        account.put()
        tiers = {key: got.tier for key, got in fetched.items()}
        memory = self._fortune.drawn(rung)

        async def succeed() -> None:
            count_text(means.metrics, plan, await self._succeed(kept, tiers, memory))

        return succeed

    async def _succeed(
        self, kept: Outcome, tiers: Mapping[str, Tier], memory: MemoryReport | None
    ) -> Mapping[str, Tier]:
        """What `JobStore.succeed` returns."""
        claim, account, metrics = self.claim, self._account, self._means.metrics
        cost = await self._means.jobs.succeed(
            claim,
            images=kept.images,
            cache=tiers,
            timings=account.timings,
            approximate=kept.approximate,
            memory=memory,
        )
        self._ends = SUCCEEDED
        for stage, seconds in stages(account.so_far):
            count_stage(metrics, stage, seconds)
        log.info("job drawn", extra={"job": claim.job_id, **_performance(claim.request, account.so_far)})
        return cost

    async def _render(self, work: Work) -> Rendered:
        on_preview = self._pulse.on_preview if work.request.preview_every else None
        self._rendering, self._moved_at = True, time.monotonic()
        drawing = asyncio.wrap_future(
            self._means.engine.submit(work, self._on_step, on_preview, self._fortune.relieved)
        )
        self._pulse.enter(JobState.RUNNING)
        try:
            return await self._ending.finish(drawing)
        except OutOfMemory:  # of this replica's card: an encoder's says nothing of it
            self._ran_out = True
            raise
        except Withdrawn:
            self._means.engine.cancel(work.run_id)
            with contextlib.suppress(TandemError):
                await drawing
            raise
        finally:
            drawing.cancel()  # where this was called off, nobody hears how it ends
            self._rendering = False

    def _on_step(self, event: StepEvent) -> None:
        """Called on the engine's thread."""
        self._moved_at = time.monotonic()
        self._pulse.on_step(event)

    def _free(self, *, drawn: bool) -> None:
        """The images no longer count. Once; what comes later changes nothing."""
        if self.rows:
            self.rows = 0
            self._means.pace.ended(self._run_id, drawn)
            self._means.freed.set()


def _performance(request: ImageRequest, timings: Timings) -> dict[str, object]:
    """What the log says of a job that was drawn: what was asked for, and the milliseconds of each stage."""
    asked = {
        "model": request.model,
        "images": request.num_images,
        "size": f"{request.width}x{request.height}",
        "steps": request.num_inference_steps,
    }
    return asked | {f"{name}_ms": round(1e3 * took) for name, took in stages(timings)}
