"""What `tandem jobs list` and `tandem jobs show` print."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve.cli.cache_screen import size
from serve.cli.screen import COLORS, ordinal, span
from serve.domain.jobs import Job, JobEvent, JobState, Timings
from serve.domain.orders import ImageRequest

_ID_WIDTH, _KEY_WIDTH = 32, 12
_STAGES = (
    ("earlier attempts", ("retried_s",)),
    ("waited", ("queued_s",)),
    ("text", ("text_s",)),
    ("denoising", ("source_s", "batch_s", "steps_s")),
    ("decoding", ("decode_wait_s", "decode_s")),
    ("storing", ("compress_s", "put_s")),
    ("in all", ("total_s",)),
)


@dataclass(frozen=True, slots=True)
class Story:
    """A job, its events without previews, the name of the key that ordered it, and how many attempts it may have."""

    job: Job
    events: Sequence[JobEvent]
    key: str | None
    max_attempts: int


def shown_list(jobs: Sequence[Job], names: Mapping[str, str], *, whose: bool) -> None:
    """A line a job, newest first. `names` are those of the keys by id; `whose` adds them where jobs have owners."""
    console = Console(highlight=False)
    if not jobs:
        console.print("no jobs")
        return
    whose = whose and any(job.owner for job in jobs)
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)  # the last column has what is left
    table.add_column("job", overflow="fold", width=min(_ID_WIDTH, max(len(job.id) for job in jobs)))
    table.add_column("state", no_wrap=True)
    table.add_column("age", justify="right", no_wrap=True)
    if whose:
        table.add_column("key", no_wrap=True, overflow="ellipsis", max_width=_KEY_WIDTH)
    table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1)
    now = time.time()
    for job in jobs:
        key = [Text(plain(names.get(job.owner, job.owner)))] if whose else []
        age = Text(span(now - job.created_at))
        table.add_row(Text(job.id), _state(job.state), age, *key, _gist(job))
    console.print(table)


def shown_story(story: Story) -> None:
    console = Console(highlight=False)
    job = story.job
    console.print(Text.assemble(("job ", "bold"), (job.id, "bold"), "  ", _state(job.state)), soft_wrap=True)
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, fact in _facts(story):
        facts.add_row(name, fact if isinstance(fact, Text) else Text(fact))
    console.print(facts)
    console.print()
    console.print(_states(story.events))


def plain(text: str) -> str:
    """What a user wrote, fit for a terminal: no control character reaches it."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _facts(story: Story) -> Iterator[tuple[str, str | Text]]:
    """Names and values, in the order in which a person asks for them."""
    job, request = story.job, story.job.request
    if job.error is not None:
        yield "why", Text(plain(f"{job.error.code}: {job.error.message}"), style="red")
    if standing := _standing(job):
        yield "now", standing
    yield "attempts", f"{job.attempt} of {story.max_attempts}"
    yield "prompt", plain(request.prompt)
    if request.negative_prompt:
        yield "not", plain(request.negative_prompt)
    yield "order", _order(request)
    if request.image is not None:
        mask = "" if request.mask is None else f", mask {request.mask}"
        blur = "" if request.mask_blur is None else f", mask blur {request.mask_blur:g}"
        yield "starts from", f"{request.image}{mask}, strength {request.strength}{blur}"
    if request.variation_seed is not None:
        yield "varied", f"by seed {request.variation_seed}, strength {request.variation_strength:g}"
    key = job.owner or "anybody (without a key)" if story.key is None else f"{story.key} ({job.owner})"
    yield "ordered by", f"{plain(key)}, {job.priority}"
    yield "predicted", f"{job.cost_ms / 1000:.1f} s of a replica"
    if job.cache is not None:
        text = f"{job.cache.memory} from memory, {job.cache.redis} from Redis, {job.cache.encoded} encoded"
        yield "text units", text
    for cut in job.truncated:
        told = f"{cut.tokens} tokens, {cut.limit} fit into {cut.encoder}: {plain(cut.text)}"
        yield "cut", Text(f"{cut.field} has {told}", style="yellow")
    if times := _times(job.timings):
        yield "took", times
    for ref in job.images:
        yield "image", f"{ref.key}, {ref.width} x {ref.height}, seed {ref.seed}, {ref.content_type}, {size(ref.bytes)}"
    if job.approximate:
        yield "approximate", ", ".join(job.approximate)
    if job.webhook is not None:
        yield "webhook", plain(f"{job.webhook}: {job.webhook_state or 'called when the job ends'}")


def _order(request: ImageRequest) -> str:
    parts = [
        request.model,
        f"{request.width} x {request.height}",
        f"{request.num_inference_steps} steps",
        f"guidance {request.guidance_scale:g}",
        f"seed {request.seed}",
        "1 image" if request.num_images == 1 else f"{request.num_images} images",
        request.output_format,
    ]
    if request.scheduler:
        parts.insert(3, request.scheduler)
    return plain(", ".join(parts))


def _standing(job: Job) -> str:
    """How far a job is that goes on."""
    if job.state.terminal:
        return ""
    place = f"step {job.step} of {job.steps}" if job.state.held else f"{ordinal(job.position or 1)} in the queue"
    return place if job.eta_s is None else f"{place}, about {span(job.eta_s)} to its end"


def _times(timings: Timings) -> str:
    """In short; `tandem trace` has every stage."""
    told = ((name, [getattr(timings, field) for field in fields]) for name, fields in _STAGES)
    known = ((name, [seconds for seconds in each if seconds is not None]) for name, each in told)
    return ", ".join(f"{name} {sum(each):.1f} s" for name, each in known if each)


def _gist(job: Job) -> Text:
    """What a line has room for: why it failed, else what it draws."""
    if job.error is not None and job.state.terminal:
        return Text(plain(f"{job.error.code}: {job.error.message}"), style="red")
    done = f"{job.step}/{job.steps} " if job.state.held else ""
    return Text(f"{done}{plain(' '.join(job.request.prompt.split()))}", style="dim")


def _states(events: Sequence[JobEvent]) -> Table:
    """When the job was in which state: one row for all events of a state under one claim."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("when", "state", "attempt", "steps", "lasted"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("when", "state") else "right")
    spans = list(_spans(events))
    for (first, last), following in zip(spans, [*spans[1:], None], strict=True):
        lasted = "" if following is None else _duration(_at(following[0]) - _at(first))
        attempt = str(first.attempt) if first.attempt else ""
        steps = f"{last.step}/{last.steps}" if last.step else ""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(_at(first)))
        table.add_row(when, _state(first.state), attempt, steps, lasted)
    return table


def _spans(events: Sequence[JobEvent]) -> Iterator[tuple[JobEvent, JobEvent]]:
    """The first and the last event of each stay in a state."""
    first: JobEvent | None = None
    last: JobEvent | None = None
    for event in events:
        if first is None or last is None or (event.state, event.fence) != (last.state, last.fence):
            if first is not None and last is not None:
                yield first, last
            first = event
        last = event
    if first is not None and last is not None:
        yield first, last


def _at(event: JobEvent) -> float:
    """Unix seconds: Redis numbers a stream's entries by its clock."""
    return int(event.id.partition("-")[0]) / 1000


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else span(seconds)


def _state(state: JobState) -> Text:
    return Text(state.value, style=COLORS.get(state, "cyan"))
