"""What every part of the job store stands on: its connections, its bell, and what the workers say of themselves."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serve.domain.jobs import Job, JobState
from serve.errors import JobNotFound
from serve.jobs import records, scripts
from serve.jobs.bell import Bell
from serve.jobs.connection import Connection, milliseconds
from serve.jobs.reading import readable
from serve.jobs.schema import SCHEMA, Schema
from serve.jobs.terms import REPORT, Backlog, Crew, Unfinished, WorkerReport
from serve.settings.stores import JobSettings
from serve.telemetry.metrics import Metrics

Fields = Mapping[str, str | bytes | int]

ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
READERS = 16
"""Connections for reading jobs' events."""
UNFINISHED_STATES = tuple(state for state in JobState if not state.terminal)
REPORT_LIFE_S, _CREW_S = 30.0, 2.0
_NOBODY = Crew()


class Shared:
    """Owns: this process's connections to the job Redis, its bell, and what it last heard of the workers."""

    def __init__(
        self, settings: JobSettings, metrics: Metrics, folder: Path = scripts.FOLDER, schema: Schema = SCHEMA
    ) -> None:
        """`folder` has the scripts; `schema` is what this release knows of orders."""
        self._settings = settings
        self._schema = schema
        self._metrics = metrics
        self._connection = Connection(settings, metrics, folder)
        # A crowd that follows jobs waits for itself alone, and keeps no order, claim or sweep waiting.
        self._reading = Connection(settings, metrics, folder, READERS)
        self._redis = self._connection.redis
        self._run = self._connection.run
        self._bell = Bell(self._redis)
        self._crews: Mapping[str, Crew] = {}
        self._heard_at = -_CREW_S

    async def report(self, report: WorkerReport, life_s: float = REPORT_LIFE_S) -> None:
        """Tell what a worker can do and how fast, and for how long that counts."""
        await self._run("report", milliseconds(life_s), report.name, REPORT.dump_json(report))

    async def crew(self, model: str) -> Crew:
        """The workers of a model that live, and the last that its other placements had, as this process heard of them
        within the last seconds. One whose report has another release's form is not known."""
        if time.monotonic() - self._heard_at >= _CREW_S:
            found = await self._run("report", 0)
            reports, silent = (sorted(readable(REPORT, each), key=_order) for each in found)
            alive = {report.placement for report in reports}
            asleep = [report for report in silent if report.placement not in alive]
            self._crews = {
                model: Crew(
                    tuple(report for report in reports if report.model == model),
                    tuple(report for report in asleep if report.model == model),
                )
                for model in {report.model for report in (*reports, *asleep)}
            }
            self._heard_at = time.monotonic()
        return self._crews.get(model, _NOBODY)

    async def backlog(self, model: str) -> Backlog:
        """The work that waits, and that is in hand."""
        return Backlog(*await self._run("backlog", model))

    async def unfinished(self) -> Sequence[Unfinished]:
        """What has not ended, for each model that has any, as of one moment. One pass over all of it."""
        found = await self._run("unfinished")
        return [
            Unfinished(
                model=model.decode(),
                states={
                    JobState(state.decode()): number for state, number in zip(states[::2], states[1::2], strict=True)
                },
                cost_ms=cost_ms,
                oldest_ms=oldest_ms,
            )
            for model, cost_ms, oldest_ms, *states in found
        ]

    async def queue_depth(self) -> int:
        """How many jobs wait."""
        depth: int = await self._connection.guarded(self._redis.zcard("tandem:queue"))
        self._metrics.set("tandem_queue_depth", depth)
        return depth

    async def ping(self) -> None:
        """BackendUnavailable unless the store answers."""
        await self._connection.guarded(self._redis.ping())

    async def close(self) -> None:
        await self._bell.close()
        await self._redis.aclose()
        await self._reading.redis.aclose()

    async def _found(self, job_id: str, snapshot: Sequence[Any]) -> Job:
        model = records.model_of(snapshot)
        job = self._read(job_id, snapshot, await self.crew(model) if model else _NOBODY)
        if job is None:
            raise unknown()
        return job

    def _read(self, job_id: str, snapshot: Sequence[Any], crew: Crew = _NOBODY) -> Job | None:
        return records.job(job_id, snapshot, crew, self._schema.newest)


def _order(report: WorkerReport) -> tuple[str, str]:
    return report.model, report.name


def flat(fields: Fields) -> list[str | bytes | int]:
    return [part for field in fields.items() for part in field]


def checked(job_id: str) -> str:
    """Ids become parts of keys; one of another shape was never given."""
    if not ID.fullmatch(job_id):
        raise unknown()
    return job_id


def unknown() -> JobNotFound:
    return JobNotFound("there is no such job, or its record's time is over", "id")
