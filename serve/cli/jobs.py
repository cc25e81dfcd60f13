"""`tandem jobs`: the operator's view of every job, whoever's it is. It asks the job Redis itself, so that no server has
to run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import TypeAdapter

from serve.cli.jobs_screen import Story, shown_list, shown_story
from serve.cli.options import AsJson, Assignments, ConfigFile, DataDir, behind
from serve.domain.jobs import Job, JobEvent, JobState
from serve.errors import JobNotFound, OperatorError

if TYPE_CHECKING:
    from serve.cli.backstage import Backstage

jobs = typer.Typer(help="Look after the jobs, whoever ordered them.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]

_JOB, _EVENTS = TypeAdapter(Job), TypeAdapter(list[JobEvent])


@jobs.command("list")
def list_jobs(
    dead: Annotated[
        bool, typer.Option("--dead", help="Those alone that failed although nothing was wrong with the order.")
    ] = False,
    state: Annotated[
        list[str] | None, typer.Option(help="Those in this state alone; may be repeated.", show_default=False)
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Those of one API key, by its id or name.")] = None,
    number: Annotated[str, typer.Option("-n", "--number", metavar="N", help="How many, from the newest on.")] = "20",
    as_json: AsJson = False,
    data_dir: DataDir = None,
    config_file: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """The newest jobs."""
    states, most = _states(state or []), _count(number)

    async def story(stage: Backstage) -> None:
        keys = await stage.keys.list()
        names = {key.id: key.name for key in keys}
        found = await _newest(stage, _owner(owner, names), states, dead, most)
        if as_json:
            print(json.dumps([_JOB.dump_python(job, mode="json") for job in found], indent=2))
        else:
            shown_list(found, names, whose=owner is None)

    behind(story, data_dir, config_file, assignments)


@jobs.command("show")
def show_job(
    job_id: JobId,
    as_json: AsJson = False,
    data_dir: DataDir = None,
    config_file: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """All that is known of a job: what was ordered, what happened when, why it failed."""

    async def story(stage: Backstage) -> None:
        job = await stage.jobs.get(job_id)
        events = await _history(stage, job_id)
        if as_json:
            told = {"job": _JOB.dump_python(job, mode="json"), "events": _EVENTS.dump_python(events, mode="json")}
            print(json.dumps(told, indent=2))
            return
        names = {key.id: key.name for key in await stage.keys.list()}
        shown_story(Story(job, events, names.get(job.owner), stage.settings.jobs.max_attempts))

    behind(story, data_dir, config_file, assignments)


@jobs.command("retry")
def retry_job(
    job_id: JobId,
    data_dir: DataDir = None,
    config_file: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """Order again what failed, expired or was cancelled, for the same owner. Prints the new job's id."""

    async def story(stage: Backstage) -> None:
        from serve.retry import retry

        owner = (await stage.jobs.get(job_id)).owner
        weights = {key.id: key.weight for key in await stage.keys.list()}
        print((await retry(stage.jobs, stage.results, job_id, weight=weights.get(owner, 1.0))).id)

    behind(story, data_dir, config_file, assignments)


@jobs.command("cancel")
def cancel_job(
    job_id: JobId,
    data_dir: DataDir = None,
    config_file: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """Cancel: a waiting job at once, one that is being drawn at its next step. What has ended stays what it is."""

    async def story(stage: Backstage) -> None:
        before = await stage.jobs.get(job_id)
        job = await stage.jobs.cancel(job_id)
        if before.state.terminal:
            raise OperatorError(f"job {job_id} has ended already: {job.state}", "id")
        print(f"{job.state}; its worker has been told" if job.state.held else job.state)

    behind(story, data_dir, config_file, assignments)


def _states(names: list[str]) -> list[JobState]:
    for name in names:
        if name not in list(JobState):
            raise OperatorError(f"--state {name}: there are {', '.join(JobState)}", "state")
    return [JobState(name) for name in names]


def _count(number: str) -> int:
    if not (number.isdecimal() and number.isascii() and 0 < len(number) <= 9 and int(number)):
        raise OperatorError(f"-n {number}: write a whole number from 1 on", "number")
    return int(number)


def _owner(name: str | None, names: dict[str, str]) -> str | None:
    """The id of a key by its id or name. What names no key may be a tenant of an authenticating proxy."""
    if name is None or name in names:
        return name
    found = [each for each, its in names.items() if its == name]
    if len(found) > 1:
        raise OperatorError(f"--owner {name}: {len(found)} keys have that name: {', '.join(found)}", "owner")
    return found[0] if found else name


async def _newest(stage: Backstage, owner: str | None, states: list[JobState], dead: bool, number: int) -> list[Job]:
    found: list[Job] = []
    after: str | None = None
    while len(found) < number:
        page = await stage.jobs.jobs(owner, states=states, dead=dead, after=after, count=number - len(found))
        found += page.jobs
        after = page.next
        if after is None:
            break
    return found


async def _history(stage: Backstage, job_id: str) -> list[JobEvent]:
    """The job's events but for its previews."""
    events: list[JobEvent] = []
    after: str | None = None
    while True:
        try:
            page, _ = await stage.jobs.events_after(job_id, after, previews=False)
        except JobNotFound:
            return events  # deleted meanwhile
        if not page:
            return events
        events += (event for event in page if event.index is None)
        after = page[-1].id
