"""A history's entries, collected from outside: a job's own stream, what clients are told, and what the store holds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support.history import Accepted, Answer, Entry, Put, Transition

from serve.domain.jobs import Job
from serve.errors import JobNotFound
from serve.jobs.store import JobStore

PREFIX = "images/"
_NOT_OF_JOBS = ("writable",)


async def transitions(store: JobStore, job_id: str) -> list[Transition]:
    """The job's stream without its previews; nothing for a job that is not there."""
    found: list[Transition] = []
    after: str | None = None
    try:
        while True:
            events, _ = await store.events_after(job_id, after, previews=False)
            if not events:
                return found
            after = events[-1].id
            found += [
                Transition(
                    job=job_id,
                    state=event.state,
                    step=event.step,
                    attempt=event.attempt,
                    fence=event.fence,
                    at=int(event.id.partition("-")[0]) / 1000,
                    event=event.id,
                )
                for event in events
                if event.index is None
            ]
    except JobNotFound:
        return found


def answer(job: Job) -> Answer:
    return Answer(
        job=job.id,
        state=job.state,
        attempt=job.attempt,
        images={image.index: image.bytes for image in job.images},
        error=job.error.code if job.error else None,
    )


async def collected(store: JobStore, told: Iterable[Entry], puts: Iterable[Put]) -> list[Entry]:
    """The whole history: what clients were told (`told`), of every job its stream and its end, then the objects."""
    entries = list(told)
    history: list[Entry] = list(entries)
    for job_id in {entry.job: None for entry in entries if not isinstance(entry, Put)}:
        stream = await transitions(store, job_id)
        history += stream
        if stream and stream[-1].state.terminal and any(isinstance(e, Accepted) and e.job == job_id for e in entries):
            history.append(answer(await store.get(job_id)))
    return history + list(puts)


def puts_of_folder(folder: Path) -> list[Put]:
    """The files of `LocalStore`. A folder shows one version of each."""
    return [
        Put(key=path.relative_to(folder).as_posix(), version=str(path.stat().st_ino), bytes=path.stat().st_size)
        for path in sorted(folder.glob("*/*"))
        if path.is_file()
    ]


def puts_of_bucket(s3: Any, bucket: str, prefix: str = PREFIX) -> list[Put]:
    """Every version of every object, deleted ones too; `s3` is a boto3 client, the bucket versioned."""
    puts = []
    for page in s3.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=prefix):
        for version in page.get("Versions", ()):
            key = version["Key"].removeprefix(prefix)
            if key not in _NOT_OF_JOBS:
                puts.append(Put(key=key, version=version["VersionId"], bytes=version["Size"]))
    return puts
