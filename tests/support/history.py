"""What happened to jobs, as seen from outside, and the one checker of it.

A history is a list of entries, kept as JSON lines. Of one job they are in order; of different jobs they may mix.
`chaos_collect.py` writes them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from serve.domain.jobs import JobState


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A client heard that the job is logged. `images` is how many it ordered."""

    job: str
    owner: str = ""
    images: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A client heard a no: the order did nothing."""

    job: str
    code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unheard:
    """A client heard nothing, and gave up asking: the job may exist. If it does, it is a job like any other."""

    job: str
    images: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """An entry of the job's own event stream, previews left out. `at` is its time on the store's clock, in seconds."""

    job: str
    state: JobState
    step: int
    attempt: int
    fence: int
    at: float
    event: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A worker heard that what it did under claim `fence` counts: `claimed`, `renewed`, or the outcome that it settled
    the job with.

    `asked` and `told` are when the call began (the first one, of a settlement that was repeated) and when its answer
    was there, on a clock that all workers share (`time.monotonic` of one machine). Without them (0) the order of the
    entries is that of time.
    """

    job: str
    fence: int
    what: str
    asked: float = 0.0
    told: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Late:
    """A worker heard that claim `fence` is over, when it spoke to renew or to settle it (`what`). Times as of Heard."""

    job: str
    fence: int
    what: str
    asked: float = 0.0
    told: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """One version of an object in the result store. `key` starts with the job's id and a slash."""

    key: str
    version: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the client was told at the end. `images` has the size of each file by the image's index."""

    job: str
    state: JobState
    attempt: int
    images: Mapping[int, int] = field(default_factory=dict)
    error: str | None = None


Entry = Accepted | Refused | Unheard | Transition | Heard | Late | Put | Answer
_KINDS: Mapping[str, type[Entry]] = {
    kind.__name__.lower(): kind for kind in (Accepted, Refused, Unheard, Transition, Heard, Late, Put, Answer)
}
OfOne = TypeVar("OfOne", Accepted, Refused, Unheard, Transition, Heard, Late, Put, Answer)


def write(path: Path, history: Iterable[Entry]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(map(line_of, history))


def line_of(entry: Entry) -> str:
    return json.dumps({"kind": type(entry).__name__.lower()} | dataclasses.asdict(entry)) + "\n"


def read(path: Path) -> list[Entry]:
    return [_entry(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _entry(fields: dict[str, object]) -> Entry:
    kind = _KINDS[str(fields.pop("kind"))]
    if "state" in fields:
        fields["state"] = JobState(str(fields["state"]))
    if isinstance(images := fields.get("images"), dict):
        fields["images"] = {int(index): size for index, size in images.items()}
    return kind(**fields)  # type: ignore[arg-type]


def violations(history: Sequence[Entry], max_attempts: int = 3) -> list[str]:
    """One line for each broken rule; empty when every job was done once and nothing was lost."""
    accepted = {entry.job: entry for entry in _of(history, Accepted)}
    unheard = {entry.job: entry for entry in _of(history, Unheard)}
    refused = {entry.job for entry in _of(history, Refused)} - accepted.keys() - unheard.keys()
    streams, heard, puts, answers = defaultdict(list), defaultdict(list), defaultdict(list), defaultdict(list)
    late = defaultdict(list)
    for transition in _of(history, Transition):
        streams[transition.job].append(transition)
    for word in _of(history, Heard):
        heard[word.job].append(word)
    for refusal in _of(history, Late):
        late[refusal.job].append(refusal)
    for put in _of(history, Put):
        puts[put.key.partition("/")[0]].append(put)
    for answer in _of(history, Answer):
        answers[answer.job].append(answer)
    known = accepted.keys() | {job for job in unheard if job in streams}
    found = [f"{job}: was accepted and is gone" for job in accepted if job not in streams]
    found += [f"{job}: was refused and is there" for job in sorted(refused & (streams.keys() | puts.keys()))]
    found += [f"{job}: is known to nobody" for job in sorted(streams.keys() - known - refused)]
    found += [f"{job}: has objects and is known to nobody" for job in sorted(puts.keys() - known - refused)]
    found += [f"{job}: nobody knows how it ended" for job in accepted if job in streams and job not in answers]
    for job in sorted(known & streams.keys()):
        images = (accepted.get(job) or unheard[job]).images
        broken = [
            *_of_the_stream(streams[job], max_attempts),
            *_of_claims(streams[job], heard[job]),
            *_of_the_late(streams[job], late[job]),
            *_of_objects(streams[job][-1].state, images, puts[job]),
            *(rule for answer in answers[job] for rule in _of_the_answer(answer, streams[job][-1], images, puts[job])),
        ]
        found += [f"{job}: {rule}" for rule in broken]
    return found


def _of(history: Sequence[Entry], kind: type[OfOne]) -> Iterator[OfOne]:
    return (entry for entry in history if isinstance(entry, kind))


def _of_the_stream(stream: Sequence[Transition], max_attempts: int) -> Iterator[str]:
    ends = [number for number, entry in enumerate(stream) if entry.state.terminal]
    if not ends:
        yield f"never ended; its last state is {stream[-1].state}"
    if len(ends) > 1:
        yield f"ended {len(ends)} times"
    if ends and ends[0] != len(stream) - 1:
        yield f"went on after it had ended: {stream[ends[0] + 1].state}"
    first = stream[0]
    if (first.state, first.step, first.attempt, first.fence) != (JobState.QUEUED, 0, 0, 0):
        yield f"did not start in the queue, unclaimed, but {_told(first)}"
    if most := max((entry.attempt for entry in stream if entry.attempt > max_attempts), default=0):
        yield f"used {most} attempts of {max_attempts}"
    for before, after in itertools.pairwise(stream):
        if _order(after.event) <= _order(before.event):
            yield f"its events are out of order: {before.event}, {after.event}"
        if (rule := _broken(before, after)) and not before.state.terminal:
            yield f"{rule}: {_told(before)} -> {_told(after)}"


def _broken(before: Transition, after: Transition) -> str | None:
    """The rule that this step of the state machine breaks."""
    claimed = before.state is JobState.QUEUED and after.state.held
    if after.fence < before.fence:
        return "the fence went back"
    if after.fence != before.fence + claimed:
        return "an entry has not the fence of the claim before it"
    if claimed:
        if after.state is not JobState.ENCODING or after.step:
            return "a claim does not start with the text"
        return None if after.attempt == before.attempt + 1 else "a claim counts as no attempt, or as several"
    if after.state is JobState.QUEUED:
        if not before.state.held or after.step:
            return "nobody held what went back to the queue"
        return None if before.attempt - after.attempt in (0, 1) else "the attempts changed"
    if after.attempt not in (before.attempt, before.attempt - (after.state is JobState.CANCELLED)):
        return "the attempts changed without a claim"  # a job that is released although nobody wants it ends there
    if after.state is JobState.SUCCEEDED or after.state is JobState.FAILED:
        return None if before.state.held else "nobody held what was settled"
    if after.state.terminal:
        return None
    if _RANK[after.state] < _RANK[before.state] or after.step < before.step:
        return "it went back without a claim"
    return None


_RANK = {state: rank for rank, state in enumerate(JobState)}


def _of_claims(stream: Sequence[Transition], heard: Sequence[Heard]) -> Iterator[str]:
    """A settlement is the last thing that happens under its claim, and one is made of a claim at most."""
    newest, made = 0, 0.0
    for word in sorted(heard, key=_moment):
        claims = word.what == "claimed"
        if claims and word.fence > newest:
            newest, made = word.fence, word.told
        # A worker that was stopped may hear of a claim long after it was made.
        if word.fence < newest and not (claims and word.asked < made):
            yield f"claim {word.fence} heard that it was {word.what} after claim {newest} was made"
    settled = [word for word in heard if word.what not in ("claimed", "renewed")]
    claims = [word.fence for word in settled]
    for fence in sorted({fence for fence in claims if claims.count(fence) > 1}):
        yield f"claim {fence} was settled {claims.count(fence)} times"
    for word in settled:
        under = [entry for entry in stream if entry.fence == word.fence]
        if not under:
            yield f"claim {word.fence} was settled as {word.what} and never made"
        elif under[-1].state.held:
            yield f"claim {word.fence} was settled as {word.what}, which its stream does not know"
        elif word.what == JobState.SUCCEEDED and under[-1].state is not JobState.SUCCEEDED:
            yield f"claim {word.fence} was told of success, and its job is {under[-1].state}"


def _moment(word: Heard) -> float:
    """The latest that a claim was made, the earliest that anything else was done: who comes after a claim in this order
    spoke when it had been made, and must be refused. A call under way at that moment may have come first."""
    return word.told if word.what == "claimed" else word.asked


def _of_the_late(stream: Sequence[Transition], late: Sequence[Late]) -> Iterator[str]:
    """Nobody is refused whose claim is not over."""
    for word in late:
        under = [entry for entry in stream if entry.fence == word.fence]
        if not under:
            yield f"claim {word.fence} heard that it is over, and was never made"
        elif under[-1].state.held and stream[-1] is under[-1]:
            yield f"claim {word.fence} heard that it is over, which its stream does not know"


def spoke_too_late(history: Sequence[Entry]) -> list[Late]:
    """Who spoke under a claim after another worker had been told that it has the job, and was refused."""
    taken: dict[tuple[str, int], float] = {}
    for word in _of(history, Heard):
        if word.what == "claimed":
            taken[word.job, word.fence] = word.told
    return [
        late
        for late in _of(history, Late)
        if any(job == late.job and fence > late.fence and told < late.asked for (job, fence), told in taken.items())
    ]


def _of_objects(end: JobState, images: int, puts: Sequence[Put]) -> Iterator[str]:
    versions: dict[str, list[Put]] = defaultdict(list)
    for put in puts:
        versions[put.key].append(put)
    for key, made in sorted(versions.items()):
        if len(made) > 1:
            yield f"{key} was put {len(made)} times"
    drawn = _drawn(puts)
    if strange := sorted(set(drawn) - set(range(images))):
        yield f"image {strange[0]} was never ordered"
    if end is not JobState.SUCCEEDED:
        return
    if missing := sorted(set(range(images)) - set(drawn)):
        yield f"succeeded without image {missing[0]}"
    if not any("manifest" in key for key in versions):
        yield "succeeded without a manifest"
    if len(drawn) != sum(_index(key) is not None for key in versions):
        yield "has an image in two forms"
    if empty := sorted(index for index, put in drawn.items() if not put.bytes):
        yield f"image {empty[0]} is empty"


def _of_the_answer(answer: Answer, end: Transition, images: int, puts: Sequence[Put]) -> Iterator[str]:
    if answer.state is not end.state or answer.attempt != end.attempt:
        yield f"the client was told {answer.state} in attempt {answer.attempt}, its stream says {_told(end)}"
    if answer.state is JobState.SUCCEEDED:
        stored = {index: put.bytes for index, put in _drawn(puts).items()}
        if dict(answer.images) != {index: stored.get(index) for index in range(images)}:
            yield f"the client was told of other images than there are: {dict(answer.images)} and not {stored}"
    elif answer.images:
        yield f"{answer.state}, and the client was told of images"
    if (answer.error is None) is (answer.state in (JobState.FAILED, JobState.EXPIRED)):
        yield f"{answer.state} with the error {answer.error}"


def _drawn(puts: Sequence[Put]) -> dict[int, Put]:
    """The images among a job's objects, by index."""
    return {index: put for put in puts if (index := _index(put.key)) is not None}


def _index(key: str) -> int | None:
    stem = key.partition("/")[2].rpartition(".")[0]
    return int(stem) if stem.isdecimal() else None


def _order(event: str) -> tuple[int, int]:
    milliseconds, _, number = event.partition("-")
    return int(milliseconds), int(number)


def _told(entry: Transition) -> str:
    return f"{entry.state} (step {entry.step}, attempt {entry.attempt}, fence {entry.fence})"
