"""An order's way in: is there room, what does it come to, what will it cost; then the job is logged, once."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.aside import read_aside
from serve.callers import Caller
from serve.costs import Costs, Estimate
from serve.domain.orders import Arrival, ImageRequest
from serve.domain.text import Note, TokenCount, Truncation
from serve.errors import (
    BackendUnavailable,
    Conflict,
    InvalidRequest,
    JobGone,
    JobNotFound,
    QueueFull,
    RateLimited,
    Unavailable,
)
from serve.fleet import check_replicas
from serve.inputs import Inputs, Pictures, settled
from serve.jobs.store import JobStore, Terms
from serve.jobs.terms import Crew, Submitted
from serve.models import ModelFolder
from serve.once import Once, fingerprint_of
from serve.orders import NewImage, complete, drawn
from serve.placements import Fleet, Placement
from serve.prompts.advice import notes_on
from serve.prompts.plan import Planner, PromptPlan
from serve.settings.front import WebhookSettings
from serve.settings.orders import LimitSettings, TemplateSettings
from serve.settings.stores import JobSettings
from serve.webhooks import check_webhook

ASK_AGAIN_S = 1.0
"""Between two questions to a job store that is away."""
ASK_FIRST_S = 1.0
"""For so long after a queue was found full the store is asked for room before an order's text is planned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A submission, and the plan of its text: None for an order that was logged before."""

    submitted: Submitted
    plan: PromptPlan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """What an order would come to now. `position` and `eta_s` are those of a job behind all that wait; `known` says
    whether a replica has told of its speed; `placements` are those that hold it. `refusal` is what a submission would
    be answered with instead."""

    request: ImageRequest
    tokens: tuple[TokenCount, ...]
    truncated: tuple[Truncation, ...]
    notes: tuple[Note, ...]
    cost_ms: int
    known: bool
    position: int
    eta_s: float
    placements: tuple[Placement, ...]
    refusal: Unavailable | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """An order whose pictures were read and whose text was planned; nothing of it is kept yet."""

    request: ImageRequest
    pictures: Pictures
    plan: PromptPlan
    notes: tuple[Note, ...]
    estimate: Estimate
    crew: Crew


@dataclass(slots=True)
class Intake:
    """Takes orders in.

    Owns: the tasks that clear up after submissions whose answer was lost, and when the store last refused one.
    """

    models: Mapping[str, ModelFolder]
    fleet: Fleet
    limits: LimitSettings
    rules: JobSettings
    webhooks: WebhookSettings
    jobs: JobStore
    inputs: Inputs
    planners: Mapping[str, Planner]
    templates: Mapping[str, TemplateSettings] = field(default_factory=dict)
    costs: Costs = field(default_factory=Costs)
    clearing: set[asyncio.Task[None]] = field(default_factory=set)
    refused_at: float = -math.inf

    async def submit(
        self, new: NewImage, caller: Caller, once: Once | None, arrival: Arrival | None = None
    ) -> Accepted:
        """Log the job durably; what it starts from is stored before. `arrival` enters the record of a new one.

        A caller who goes away takes the job along, unless `once` lets them ask for it again. Raises what
        `ImageService.submit` raises.
        """
        if once is None:
            return await self._new(new, caller, None, None, arrival)
        fingerprint = await fingerprint_of(new)
        if known := await self._former(once, caller, fingerprint):
            return Accepted(submitted=known)
        try:
            return await self._new(new, caller, once, fingerprint, arrival)
        except (QueueFull, RateLimited):
            # The same order may have taken the last place meanwhile.
            if known := await self._former(once, caller, fingerprint):
                return Accepted(submitted=known)
            raise

    async def _new(
        self, new: NewImage, caller: Caller, once: Once | None, fingerprint: str | None, arrival: Arrival | None
    ) -> Accepted:
        job_id = (once and once.job_id) or uuid.uuid4().hex
        await self.look(new, caller)
        draft = await self._drafted(job_id, new, caller)
        terms = _terms(new, caller, draft.estimate, fingerprint, once, arrival)
        if draft.pictures.uploads:  # decoding and storing them is what a refusal must not cost
            await self.jobs.admit(draft.request.model, draft.estimate.cost_ms, caller.owner, caller.allowance)
        await self.inputs.keep(draft.pictures, draft.request.width, draft.request.height)
        try:
            submitted = await settled(self._logged(draft, terms, once))
        except asyncio.CancelledError:
            if once is None:  # nobody has the id
                await settled(self._taken_back(draft.pictures))
            raise
        return Accepted(submitted=submitted, plan=None if submitted.replayed else draft.plan)

    async def quote(self, new: NewImage, caller: Caller) -> Quote:
        """What the order would come to; nothing is queued or kept, and nothing is charged. Of its pictures the headers
        are read."""
        if new.webhook is not None:
            check_webhook(new.webhook, self.webhooks)
        draft = await self._drafted(uuid.uuid4().hex, new, caller)
        request, estimate = draft.request, draft.estimate
        backlog = await self.jobs.backlog(request.model)
        workers = max(1, len(draft.crew.reports))
        work_ms = (backlog.cost_ms + backlog.held_ms) / workers + estimate.alone_ms
        return Quote(
            request=request,
            tokens=draft.plan.tokens,
            truncated=draft.plan.truncated,
            notes=draft.notes,
            cost_ms=estimate.cost_ms,
            known=estimate.known,
            position=backlog.depth + 1,
            eta_s=draft.crew.start_s(request.pixels) + draft.crew.pace * work_ms / 1000,
            placements=tuple(each for each in self.fleet.for_model(request.model) if each.max_pixels >= request.pixels),
            refusal=await self._refusal(request, estimate, caller),
        )

    async def _refusal(self, request: ImageRequest, estimate: Estimate, caller: Caller) -> Unavailable | None:
        try:
            await self.jobs.admit(request.model, estimate.cost_ms, caller.owner, caller.allowance)
        except (QueueFull, RateLimited) as refusal:
            return refusal
        return None

    def close(self) -> None:
        for task in self.clearing:
            task.cancel()

    async def _former(self, once: Once, caller: Caller, fingerprint: str) -> Submitted | None:
        """Looked for before anything of the order is read: a replay costs one look, and stores no pictures."""
        try:
            job = await self.jobs.peek(caller.owner, fingerprint, key=once.key, job_id=once.job_id or "")
        except (Conflict, JobGone, JobNotFound) as error:
            raise type(error)(error.message, once.named) from None
        if job is None:
            return None
        return Submitted(job=job, replayed=True, limits=await self.jobs.limits(caller.owner, caller.allowance))

    async def look(self, new: NewImage, caller: Caller) -> None:
        """What can be refused without a look at the pictures and the prompt is refused here. A full queue too: the
        script that logs the job decides, but for whom it refuses pictures were decoded and stored. Where there are none
        that is worth a question of its own only while the store refuses."""
        if new.webhook is not None:
            check_webhook(new.webhook, self.webhooks)
        model, _ = drawn(new.model, self.models)
        refusing = time.monotonic() - self.refused_at < ASK_FIRST_S
        if refusing or new.image is not None or new.mask is not None:
            try:
                await self.jobs.admit(model.name, 1, caller.owner, caller.allowance)
            except QueueFull:
                self.refused_at = time.monotonic()
                raise

    async def _drafted(self, job_id: str, new: NewImage, caller: Caller) -> _Draft:
        uploads = await self.inputs.read(new, caller.owner)
        pictures = Pictures(job_id, uploads, new.resize_mode, new.mask_invert, new.padding_mask_crop is not None)
        request = await read_aside(
            new.characters,
            lambda: complete(new, self.models, self.fleet, self.limits, pictures.given, self.templates),
        )
        text = request.text
        plan, notes = await read_aside(text.characters, lambda: (self.planners[text.model].plan(text), notes_on(text)))
        if plan.composed > 1 and not request.guided:
            raise InvalidRequest(
                f"prompt: AND adds up what {plan.composed} prompts each do to the guidance, and at a guidance scale of "
                f"{request.cfg_scale:g} there is none; take more than 1",
                "prompt",
            )
        request = dataclasses.replace(request, composed=plan.composed)
        crew = await self.jobs.crew(request.model)
        check_replicas(self.fleet, request, crew.reports)
        estimate = self.costs.estimate(request, crew)
        if estimate.known and estimate.alone_ms > 1000 * self.rules.timeout_s:
            named = "num_images" if request.num_images > 1 else "num_inference_steps"
            raise InvalidRequest(
                f"{named}: this would take {estimate.alone_ms / 1000:.0f} s on an idle replica, "
                f"and a job must end within {self.rules.timeout_s:.0f} s (jobs.timeout_s)",
                named,
            )
        return _Draft(request=request, pictures=pictures, plan=plan, notes=notes, estimate=estimate, crew=crew)

    async def _logged(self, draft: _Draft, terms: Terms, once: Once | None) -> Submitted:
        """Goes through to its end whoever is cancelled, so that the pictures are kept for a job that was logged, and
        for no other."""
        pictures = draft.pictures
        try:
            submitted = await self.jobs.submit(
                pictures.job_id,
                draft.request,
                truncated=draft.plan.truncated,
                tokens=draft.plan.tokens,
                notes=draft.notes,
                terms=terms,
            )
        except BackendUnavailable:
            # The answer was lost, or the order: which, only the store can say when it is back.
            self._clear_later(pictures, once)
            raise
        except (Conflict, JobGone, JobNotFound) as error:
            await self.inputs.discard(pictures)
            raise type(error)(error.message, once.named if once else error.param) from None
        except QueueFull:
            self.refused_at = time.monotonic()
            await self.inputs.discard(pictures)
            raise
        except BaseException:
            await self.inputs.discard(pictures)
            raise
        if submitted.replayed:  # another was faster
            await self.inputs.discard(pictures)
        return submitted

    async def _taken_back(self, pictures: Pictures) -> None:
        """The job is cancelled, if it was logged, and its pictures go."""
        try:
            with contextlib.suppress(JobNotFound):
                await self.jobs.cancel(pictures.job_id)
            await self.inputs.discard(pictures)
        except Unavailable:
            self._clear_later(pictures, None)

    def _clear_later(self, pictures: Pictures, once: Once | None) -> None:
        task = asyncio.create_task(self._cleared(pictures, once))
        self.clearing.add(task)
        task.add_done_callback(self.clearing.discard)

    async def _cleared(self, pictures: Pictures, once: Once | None) -> None:
        """Once the store is back. A job that was logged after all is cancelled where the client, who was told that it
        is not, can't ask for it again; who can finds it, with its pictures. What no job has is deleted."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.rules.queue_ttl_s):
                while True:
                    await asyncio.sleep(ASK_AGAIN_S)
                    with contextlib.suppress(Unavailable):
                        return await self._cleared_now(pictures, once)

    async def _cleared_now(self, pictures: Pictures, once: Once | None) -> None:
        try:
            ask = self.jobs.cancel if once is None else self.jobs.get
            kept = pictures.belong_to((await ask(pictures.job_id)).request)
        except JobNotFound:
            kept = False
        if not kept:
            await self.inputs.discard(pictures)


def _terms(
    new: NewImage,
    caller: Caller,
    estimate: Estimate,
    fingerprint: str | None,
    once: Once | None,
    arrival: Arrival | None,
) -> Terms:
    return Terms(
        owner=caller.owner,
        weight=caller.weight,
        priority=new.priority,
        cost_ms=estimate.cost_ms,
        alone_ms=estimate.alone_ms,
        replicas=estimate.replicas,
        fingerprint=fingerprint,
        key=once.key if once else None,
        webhook=new.webhook,
        arrival=arrival,
        allowance=caller.allowance,
    )
