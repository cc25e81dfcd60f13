"""The JSON of what is said about jobs: pages of them, what an order would come to, what a caller may order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from serve.api.fields import Schema
from serve.api.ratelimits import UNITS
from serve.api.schemas import CompleteOrder, JobOrder, JobView
from serve.callers import Caller, Limit, Scope
from serve.domain.jobs import Job
from serve.domain.text import Note, TokenCount, Truncation
from serve.results.keys import split
from serve.submission import Quote


class JobList(Schema):
    """A page of jobs, newest first."""

    object: Literal["list"] = "list"
    data: tuple[JobView, ...]
    next: str | None
    """Send it as `cursor` for the page behind this one; null at the end."""


class FittingPlacement(Schema):
    """A kind of replica. `gpu_class` is null where it runs on any node."""

    name: str
    gpu_class: str | None


class RefusalView(Schema):
    """What an order would be answered with instead of being queued."""

    code: str
    message: str
    retry_after_s: float | None


class QuoteView(Schema):
    """What an order would come to now. Nothing was queued, kept or charged."""

    dry_run: Literal[True] = True
    request: CompleteOrder
    """The order with every default filled in. `image` and `mask` are null where the order holds the file itself."""
    template: str | None
    arm: str | None
    """Which of the template's texts it would get with this seed."""
    tokens: tuple[TokenCount, ...]
    """Tokens of the text by field and encoder, and the rows (`chunks`) that they take."""
    truncated: tuple[Truncation, ...]
    """Text that does not fit into the model's prompt."""
    notes: tuple[Note, ...]
    """What of the text is read otherwise than it was written."""
    cost_ms: int
    """Predicted share of one replica's time."""
    cost_known: bool
    """False where no replica has told of its speed yet: then the numbers only put orders in proportion."""
    position: int
    """Place in the queue at worst: fair turns between callers and `interactive` can only bring it forward."""
    eta_s: float
    """Predicted seconds until it ends, from that place."""
    placements: tuple[FittingPlacement, ...]
    """Where it can be drawn."""
    would_be_refused: RefusalView | None
    """Null where it would be queued."""

    @classmethod
    def of(cls, quote: Quote, order: JobOrder) -> QuoteView:
        request = CompleteOrder.of(quote.request)
        # A reference to a picture that is kept stays; one to a picture of a job that never was leads nowhere.
        written = {"image": order.image, "mask": order.mask}
        named = {field: text if text and split(text) else None for field, text in written.items()}
        refusal = quote.refusal
        return cls(
            request=request.model_copy(update=named),
            template=quote.request.template,
            arm=quote.request.arm,
            tokens=quote.tokens,
            truncated=quote.truncated,
            notes=quote.notes,
            cost_ms=quote.cost_ms,
            cost_known=quote.known,
            position=quote.position,
            eta_s=round(quote.eta_s, 3),
            placements=tuple(FittingPlacement(name=each.name, gpu_class=each.gpu_class) for each in quote.placements),
            would_be_refused=refusal
            and RefusalView(code=refusal.code, message=refusal.message, retry_after_s=refusal.retry_after_s),
        )


class LimitView(Schema):
    """One bound, as it stands."""

    name: str
    unit: str
    """What it counts: `requests`, `engine-seconds` (predicted seconds of a replica) or `concurrent-requests`."""
    limit: int
    remaining: int
    reset_s: float
    """Seconds until all of it is back."""
    window_s: int | None
    """Seconds in which all of it comes back; null where time brings nothing back."""


class LimitsView(Schema):
    """What the caller may do, and how much is left."""

    scopes: tuple[Scope, ...]
    weight: float
    """Share of the replicas' time beside other callers."""
    limits: tuple[LimitView, ...]
    """Empty without bounds."""

    @classmethod
    def of(cls, caller: Caller, limits: Sequence[Limit]) -> LimitsView:
        told = tuple(
            LimitView(
                name=each.name,
                unit=UNITS[each.name],
                limit=each.limit,
                remaining=each.remaining,
                reset_s=each.reset_s,
                window_s=each.window_s,
            )
            for each in limits
        )
        return cls(scopes=tuple(sorted(caller.scopes)), weight=caller.weight, limits=told)


def webhook_body(job: Job, root: str) -> bytes:
    """What a webhook tells of an ended job. `root` is where clients reach this server."""
    ended_at = datetime.fromtimestamp(job.finished_at or job.created_at, UTC)
    told = {
        "type": f"job.{job.state}",
        "timestamp": ended_at.isoformat().replace("+00:00", "Z"),
        "data": JobView.of(job, root).model_dump(mode="json"),
    }
    return json.dumps(told, ensure_ascii=False).encode()
