"""The life of one diffusion replica: it claims jobs while it may hold more, reports, and leaves in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from serve.attempt import Attempt, Means
from serve.diffusion.engine import Engine
from serve.domain.orders import ImageRequest
from serve.encoders.cache import EmbeddingCache
from serve.errors import TandemError
from serve.health import allowed_s
from serve.jobs.store import Claim, JobStore
from serve.jobs.terms import Crew, Hold, WorkerReport
from serve.patience import first
from serve.placements import Placement
from serve.prompts.plan import Planner
from serve.relief import cards_of, living
from serve.reports import Pace
from serve.results.store import ResultStore
from serve.scaling.start import ColdStart
from serve.settings.stores import JobSettings
from serve.spool import Spool
from serve.telemetry.metrics import Metrics
from serve.telemetry.tracing import Tracing
from serve.wants import IDLE_WAIT_S, wants_of

log = logging.getLogger(__name__)

REPORT_S = 5.0
RELEASE_S = 3.0
"""For giving back what is not finished, and for the step loop's end."""


class Worker:
    """Claims while it may hold more, serves what it claimed; on drain it finishes that and claims no more.

    Owns: the attempts at the jobs it holds, and their tasks.
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
        report: Callable[[Pace], WorkerReport],
        cost_of: Callable[[Pace, ImageRequest], float],
        spool_bytes: int,
        stall_s: Callable[[], float],
        tracing: Tracing | None = None,
        placements: Sequence[Placement] = (),
        start_s: float = 0.0,
    ) -> None:
        """`batch` says how many images fill a step, as far as that is known by now; `report` what is told of this
        replica, `cost_of` which milliseconds a request takes of it. `spool_bytes` of images may wait for the result
        store; after `stall_s()` without progress it is ill. Without `tracing` its jobs are not traced. `placements` are
        all of the settings: by them it is known whether there is more memory elsewhere. `start_s` is what this replica
        took to come up."""
        self._name = name
        self._placement = placement
        self._jobs = jobs
        self._engine = engine
        self._batch = batch
        self._report = report
        self._stall_s = stall_s
        self._start = ColdStart(placement.name, start_s)
        self._cards = cards_of(placement, placements, settings.timeout_s)
        self._means = Means(
            settings=settings,
            jobs=jobs,
            planner=planner,
            embeddings=embeddings,
            engine=engine,
            results=results,
            spool=Spool(spool_bytes, metrics),
            pace=Pace(batch),
            cost_of=cost_of,
            metrics=metrics,
            cards=self._cards,
            tracing=tracing,
        )
        self._draining, self._freed = self._means.draining, self._means.freed
        self._held: dict[asyncio.Task[None], Attempt] = {}
        self._before: Crew | None = None
        self._claiming = asyncio.create_task(self._claim_until_drained())
        self._reporting = asyncio.create_task(self._report_until_drained())

    @property
    def rows(self) -> int:
        """Images in hand that are not drawn yet, or that the spool has no room for."""
        return sum(attempt.rows for attempt in self._held.values())

    @property
    def ailment(self) -> str | None:
        """What is wrong with this replica, so that it has to be replaced; None while it is well."""
        if not self._engine.alive:
            return "the step loop has ended"
        if self._claiming.done() and not self._draining.is_set():
            return "the claim loop has ended"
        if self.hangs:
            return "the step loop makes no step, or leaves a job without any"
        return None

    @property
    def hangs(self) -> bool:
        """Nothing goes on in the step loop, or it passes a job over, whose turn comes once the others, a batch at a
        time, had theirs."""
        held = self._held.values()
        megapixels = max((attempt.claim.request.pixels for attempt in held), default=0) / 1e6
        decode_s = megapixels * self._means.pace.decode_ms_per_megapixel / 1000
        allowed = allowed_s(self._stall_s(), self._engine.slowest_step_s, decode_s)
        passed_over_s = max((attempt.still_s for attempt in held), default=0.0)
        turns = 1 + math.ceil(self.rows / max(1, self._batch()))
        return self._engine.still_s > allowed or passed_over_s > allowed * turns

    async def drain(self, grace_s: float) -> None:
        """Claim no more, finish what can be finished in so many seconds, give the rest back, end the step loop."""
        self._draining.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await asyncio.wait([self._claiming])
                with contextlib.suppress(TandemError):
                    await self._jobs.stand_by_no_more(self._name, self._placement.model)
                while self._held:
                    await asyncio.wait(list(self._held))
        await self._leave()
        await asyncio.to_thread(self._engine.stop, RELEASE_S)

    async def abandon(self) -> None:
        """Give everything back at once, for a step loop that hangs or a process that ends: other workers take over."""
        self._draining.set()
        await self._leave()
        self._engine.stop(0.0)

    async def _leave(self) -> None:
        """What can't even be given back, because the job store is away, is dropped: its lease runs out."""
        if self._held:
            log.warning("%d jobs are not finished and go back to the queue", len(self._held))
        self._means.leaving.set()
        self._reporting.cancel()
        farewell = asyncio.create_task(self._report_no_more())
        _, left = await asyncio.wait([farewell, self._claiming, self._reporting, *self._held], timeout=RELEASE_S)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=RELEASE_S)

    async def _claim_until_drained(self) -> None:
        """One claim at a time, for what this replica wants with the rows it has in hand just then.

        A replica whose step loop has ended claims nothing: it would fail the whole queue, job by job.
        """
        while self._engine.alive and not self._draining.is_set():
            self._freed.clear()
            # Until it is stored: what is claimed meanwhile may end this process, and with it the last attempt.
            alone = any(attempt.claim.alone for attempt in self._held.values())
            batch = self._batch()
            wants = [] if alone else wants_of(self._placement, self.rows, batch)
            if not wants:
                await first(self._freed.wait(), self._draining.wait())
                continue
            try:
                claim = await self._jobs.claim(
                    self._name, wants, idle=not self.rows, free=batch - self.rows, marks=self._cards.marks
                )
            except Exception as error:  # noqa: BLE001  what can't be claimed must not stop what is in hand
                log.warning("claiming: %s", error)
                await first(asyncio.sleep(IDLE_WAIT_S), self._draining.wait())
                continue
            if isinstance(claim, Claim):
                await self._take(claim)
            if claim is None or (isinstance(claim, Claim) and claim.last):
                # Rows that come free find nothing in an empty queue; but with some a replica is told before full ones.
                room = [self._has_room(batch)] if self.rows >= batch else []
                await first(self._jobs.wait_for_work(self._name, IDLE_WAIT_S), self._draining.wait(), *room)
            elif claim is Hold.ALONE:  # unless another worker takes that job: then there may be others
                await first(asyncio.sleep(IDLE_WAIT_S), self._freed.wait(), self._draining.wait())
            elif claim is Hold.UNFIT:
                wait_s = min([IDLE_WAIT_S, *(want.waited_s for want in wants if want.waited_s)])
                await first(self._jobs.wait_for_work(self._name, wait_s), self._freed.wait(), self._draining.wait())

    async def _has_room(self, batch: int) -> None:
        while self.rows >= batch:
            self._freed.clear()
            await self._freed.wait()

    async def _take(self, claim: Claim) -> None:
        if self._draining.is_set():  # it came while this replica was told to stop
            with contextlib.suppress(TandemError):
                await self._jobs.release(claim)
            return
        self._start.claimed(claim.queued_s)
        try:
            attempt = Attempt(self._means, claim)
        except Exception:
            log.exception("job %s could not be begun", claim.job_id)
            with contextlib.suppress(TandemError):
                await self._jobs.release(claim)
            return
        task = asyncio.create_task(attempt.run())
        self._held[task] = attempt
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._held[task]
        self._freed.set()

    async def _report_until_drained(self) -> None:
        while not self._draining.is_set():
            try:
                self._before = self._before or await self._jobs.crew(self._placement.model)
                report = self._own_report(self._before)
                self._means.metrics.set("tandem_replica_images", self.rows)
                self._means.metrics.set("tandem_replica_capacity_images", report.max_rows)
                await self._jobs.report(report)
                crew = await self._jobs.crew(self._placement.model)
                self._cards.alive = living(crew.reports)
            except Exception as error:  # noqa: BLE001  nobody draws worse for it
                log.warning("reporting: %s", error)
            await first(asyncio.sleep(REPORT_S), self._draining.wait())

    async def _report_no_more(self) -> None:
        """Nobody is to count on this replica for as long as its last report would."""
        if self._before is not None:
            with contextlib.suppress(TandemError):
                await self._jobs.report(self._own_report(self._before), life_s=0.0)

    def _own_report(self, before: Crew) -> WorkerReport:
        return replace(self._report(self._means.pace), start_s=round(self._start.seconds(before), 3))
