"""The checker finds what is planted, and nothing in a history that is sound."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from support.history import (
    Accepted,
    Answer,
    Entry,
    Heard,
    Late,
    Put,
    Refused,
    Transition,
    Unheard,
    read,
    spoke_too_late,
    violations,
    write,
)

from serve.domain.jobs import JobState

QUEUED, ENCODING, RUNNING, STORING = JobState.QUEUED, JobState.ENCODING, JobState.RUNNING, JobState.STORING
SUCCEEDED, FAILED, CANCELLED, EXPIRED = JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED


def stream(job: str, *told: tuple[JobState, int, int, int]) -> list[Entry]:
    """`told` are state, step, attempt and fence."""
    return [
        Transition(
            job=job, state=state, step=step, attempt=attempt, fence=fence, at=float(number), event=f"{1000 + number}-0"
        )
        for number, (state, step, attempt, fence) in enumerate(told)
    ]


def objects(job: str, images: int = 1) -> list[Entry]:
    names = [f"{index}.png" for index in range(images)] + ["manifest.json"]
    return [Put(key=f"{job}/{name}", version=f"v-{name}", bytes=100 + n) for n, name in enumerate(names)]


def sound() -> list[Entry]:
    """One job of each fate: drawn at once, drawn by a second worker, released, poison, unwanted, late, refused."""
    return [
        Accepted(job="plain", images=2),
        *stream("plain", (QUEUED, 0, 0, 0), (ENCODING, 0, 1, 1), (RUNNING, 1, 1, 1), (RUNNING, 2, 1, 1),
                (STORING, 2, 1, 1), (SUCCEEDED, 2, 1, 1)),
        *objects("plain", 2),
        Heard(job="plain", fence=1, what="succeeded"),
        Answer(job="plain", state=SUCCEEDED, attempt=1, images={0: 100, 1: 101}),
        Accepted(job="again"),
        *stream("again", (QUEUED, 0, 0, 0), (ENCODING, 0, 1, 1), (RUNNING, 2, 1, 1), (QUEUED, 0, 1, 1),
                (ENCODING, 0, 2, 2), (STORING, 2, 2, 2), (SUCCEEDED, 2, 2, 2)),
        *objects("again"),
        # As it is collected, by worker: the first one renews as it loses its lease, and is told when it goes on.
        Heard(job="again", fence=1, what="claimed", asked=1.0, told=1.1),
        Heard(job="again", fence=1, what="renewed", asked=2.9, told=5.0),
        Late(job="again", fence=1, what="renewed", asked=5.1, told=5.2),
        Heard(job="again", fence=2, what="claimed", asked=3.0, told=4.2),
        Heard(job="again", fence=2, what="succeeded", asked=6.0, told=6.1),
        Answer(job="again", state=SUCCEEDED, attempt=2, images={0: 100}),
        Accepted(job="released"),
        *stream("released", (QUEUED, 0, 0, 0), (ENCODING, 0, 1, 1), (QUEUED, 0, 0, 1), (ENCODING, 0, 1, 2),
                (QUEUED, 0, 1, 2), (EXPIRED, 0, 1, 2)),
        Heard(job="released", fence=1, what="release"),
        Answer(job="released", state=EXPIRED, attempt=1, error="timed_out"),
        Accepted(job="poison"),
        *stream("poison", (QUEUED, 0, 0, 0), (ENCODING, 0, 1, 1), (QUEUED, 0, 1, 1), (ENCODING, 0, 2, 2),
                (QUEUED, 0, 2, 2), (ENCODING, 0, 3, 3), (RUNNING, 1, 3, 3), (FAILED, 1, 3, 3)),
        Answer(job="poison", state=FAILED, attempt=3, error="worker_lost"),
        Accepted(job="unwanted"),
        *stream("unwanted", (QUEUED, 0, 0, 0), (ENCODING, 0, 1, 1), (CANCELLED, 0, 0, 1)),
        Answer(job="unwanted", state=CANCELLED, attempt=0),
        Refused(job="refused", code="queue_full"),
        Refused(job="unheard", code="backend_unavailable"),
        Unheard(job="unheard"),
    ]  # fmt: skip


def of(history: list[Entry], job: str) -> list[int]:
    """Where the job's transitions are."""
    return [n for n, entry in enumerate(history) if isinstance(entry, Transition) and entry.job == job]


def change(job: str, nth: int, **fields: object) -> Callable[[list[Entry]], None]:
    def plant(history: list[Entry]) -> None:
        place = of(history, job)[nth]
        history[place] = dataclasses.replace(history[place], **fields)  # type: ignore[arg-type]

    return plant


def drop(chosen: Callable[[Entry], bool]) -> Callable[[list[Entry]], None]:
    def plant(history: list[Entry]) -> None:
        history[:] = [entry for entry in history if not chosen(entry)]

    return plant


def add(*entries: Entry) -> Callable[[list[Entry]], None]:
    return lambda history: history.extend(entries)


def both(*plants: Callable[[list[Entry]], None]) -> Callable[[list[Entry]], None]:
    def plant(history: list[Entry]) -> None:
        for each in plants:
            each(history)

    return plant


def then(job: str, *told: tuple[JobState, int, int, int]) -> Callable[[list[Entry]], None]:
    """The stream goes on."""
    entries = [dataclasses.replace(entry, event=f"{2000 + n}-0") for n, entry in enumerate(stream(job, *told))]  # type: ignore[arg-type]
    return add(*entries)


PLANTED: dict[str, tuple[Callable[[list[Entry]], None], str]] = {
    "double terminal": (then("plain", (SUCCEEDED, 2, 1, 1)), "plain: ended 2 times"),
    "lost job": (
        drop(lambda entry: isinstance(entry, Transition) and entry.job == "plain"),
        "plain: was accepted and is gone",
    ),
    "job without an end": (drop(lambda entry: getattr(entry, "state", None) is FAILED), "poison: never ended"),
    "end that nobody heard of": (
        drop(lambda entry: isinstance(entry, Answer) and entry.job == "poison"),
        "poison: nobody knows how it ended",
    ),
    "double put": (add(Put(key="plain/1.png", version="v2", bytes=101)), "plain: plain/1.png was put 2 times"),
    "put in another form": (add(Put(key="again/0.webp", version="v", bytes=100)), "again: has an image in two forms"),
    "image that nobody ordered": (
        add(Put(key="again/1.png", version="v", bytes=9)),
        "again: image 1 was never ordered",
    ),
    "success without an image": (
        drop(lambda entry: isinstance(entry, Put) and entry.key == "plain/1.png"),
        "plain: succeeded without image 1",
    ),
    "success without a manifest": (
        drop(lambda entry: isinstance(entry, Put) and entry.key == "again/manifest.json"),
        "again: succeeded without a manifest",
    ),
    "other bytes than stored": (
        lambda history: history.__setitem__(
            next(n for n, entry in enumerate(history) if isinstance(entry, Put) and entry.key == "again/0.png"),
            Put(key="again/0.png", version="v", bytes=7),
        ),
        "again: the client was told of other images",
    ),
    "write after fence": (change("again", 4, fence=1), "again: an entry has not the fence of the claim before it"),
    "late write under the new claim": (
        lambda history: history.insert(
            of(history, "again")[4] + 1,
            Transition(job="again", state=RUNNING, step=2, attempt=1, fence=1, at=4.0, event="1004-5"),
        ),
        "again: the fence went back",
    ),
    "late settlement that was taken": (
        add(Heard(job="again", fence=1, what="succeeded")),
        "again: claim 1 was told of success, and its job is queued",
    ),
    "claim settled twice": (
        add(Heard(job="plain", fence=1, what="failed")),
        "plain: claim 1 was settled 2 times",
    ),
    "settlement without a trace": (
        both(change("again", 3, state=RUNNING), add(Heard(job="again", fence=1, what="retry"))),
        "again: claim 1 was settled as retry, which its stream does not know",
    ),
    "late renewal that was taken": (
        add(Heard(job="plain", fence=2, what="claimed"), Heard(job="plain", fence=1, what="renewed")),
        "plain: claim 1 heard that it was renewed after claim 2 was made",
    ),
    "late claim, by the clock": (
        lambda history: history.insert(0, Heard(job="again", fence=1, what="claimed", asked=4.3, told=4.4)),
        "again: claim 1 heard that it was claimed after claim 2 was made",
    ),
    "late renewal, by the clock": (
        lambda history: history.insert(0, Heard(job="again", fence=1, what="renewed", asked=4.3, told=4.4)),
        "again: claim 1 heard that it was renewed after claim 2 was made",
    ),
    "refused without a reason": (
        add(Late(job="plain", fence=2, what="renewed")),
        "plain: claim 2 heard that it is over, and was never made",
    ),
    "refused while it held the job": (
        both(
            drop(lambda entry: isinstance(entry, Transition) and entry.job == "plain" and entry.state is SUCCEEDED),
            add(Late(job="plain", fence=1, what="renewed")),
        ),
        "plain: claim 1 heard that it is over, which its stream does not know",
    ),
    "attempts without end": (change("poison", 7, attempt=4), "poison: used 4 attempts of 3"),
    "life after death": (then("unwanted", (RUNNING, 0, 0, 1)), "unwanted: went on after it had ended"),
    "two claims at once": (change("again", 3, state=ENCODING, fence=2), "again: an entry has not the fence"),
    "success out of the queue": (
        change("released", 5, state=SUCCEEDED),
        "released: nobody held what was settled",
    ),
    "step back": (change("plain", 3, step=0), "plain: it went back without a claim"),
    "state back": (change("plain", 4, state=ENCODING), "plain: it went back without a claim"),
    "running before it was claimed": (change("plain", 1, state=RUNNING), "plain: a claim does not start with the text"),
    "claim for nothing": (change("released", 3, attempt=0), "released: a claim counts as no attempt"),
    "refused and queued": (add(*stream("refused", (QUEUED, 0, 0, 0))), "refused: was refused and is there"),
    "refused and stored": (add(*objects("refused")), "refused: was refused and is there"),
    "job of nobody": (add(*stream("ghost", (QUEUED, 0, 0, 0))), "ghost: is known to nobody"),
    "objects of nobody": (add(*objects("ghost")), "ghost: has objects and is known to nobody"),
    "job that is there although nobody heard": (
        add(*stream("unheard", (QUEUED, 0, 0, 0))),
        "unheard: never ended",
    ),
    "other end than told": (
        add(Answer(job="again", state=FAILED, attempt=2, error="worker_lost")),
        "again: the client was told failed",
    ),
    "failure without a reason": (
        both(
            drop(lambda entry: isinstance(entry, Answer) and entry.job == "poison"),
            add(Answer(job="poison", state=FAILED, attempt=3)),
        ),
        "poison: failed with the error None",
    ),
    "events out of order": (change("plain", 3, event="1001-5"), "plain: its events are out of order"),
    "job that starts in mid-run": (
        drop(lambda entry: isinstance(entry, Transition) and entry.job == "plain" and entry.event == "1000-0"),
        "plain: did not start in the queue",
    ),
}


def test_a_sound_history_breaks_no_rule() -> None:
    assert violations(sound()) == []


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(name: str) -> None:
    plant, told = PLANTED[name]
    history = sound()
    plant(history)
    assert any(line.startswith(told) for line in violations(history)), violations(history)


def test_who_spoke_too_late_is_known_by_the_clock() -> None:
    assert [(late.job, late.fence, late.asked) for late in spoke_too_late(sound())] == [("again", 1, 5.1)]


def test_a_history_survives_its_file(tmp_path: Path) -> None:
    write(tmp_path / "history.jsonl", sound())
    assert read(tmp_path / "history.jsonl") == sound()
