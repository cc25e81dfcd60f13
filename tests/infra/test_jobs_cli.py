"""`tandem jobs` on a real job Redis: what the operator sees and may do."""

import asyncio
import dataclasses
import json
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from support.jobs import ANY, BROKEN, CUT, a_request

from serve.callers import Allowance, Scope
from serve.cli.app import main
from serve.cli.backstage import Backstage, backstage
from serve.domain.jobs import ImageRef, Job, JobState, Timings
from serve.domain.orders import Priority
from serve.domain.text import Tier
from serve.errors import InvalidRequest, JobNotFound
from serve.jobs.store import Claim, JobStore, Terms
from serve.retry import retry
from serve.settings.stores import JobSettings
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics

PNG = b"\x89PNG not really"
DONE, FAILED, DRAWN, WAITING = "d" * 32, "f" * 32, "e" * 32, "a" * 32
INPUT = f"{FAILED}/image-0123abcd.png"
EVIL = "a \x1b[2Jred\u202e circle\nover two lines"


@dataclasses.dataclass
class Operator:
    """A job Redis, a folder, and the command."""

    settings: Settings
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object, columns: int = 80) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of `tandem jobs`."""
        url = self.settings.jobs.redis_url
        assert url is not None
        options = ("--data-dir", self.settings.data_dir, "--set", f"jobs.redis_url={url.get_secret_value()}")
        words = ["tandem", "jobs", *arguments, *options, "--set", "jobs.max_attempts=1"]
        self.monkeypatch.setattr(sys, "argv", [*map(str, words)])
        self.monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as end:
            main()
        told = self.capsys.readouterr()
        return int(end.value.code or 0), told.out, told.err

    def behind(self, story: Callable[[Backstage], Coroutine[Any, Any, Any]]) -> Any:
        """What the story returns."""

        async def run() -> Any:
            async with backstage(self.settings) as stage:
                return await story(stage)

        return asyncio.run(run())


@pytest.fixture
def operator(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Operator:
    jobs = JobSettings(redis_url=SecretStr(redis_url), max_attempts=1)
    return Operator(Settings(data_dir=tmp_path, jobs=jobs), monkeypatch, capsys)


async def _claimed(stage: Backstage, job_id: str, *, terms: Terms = Terms(), **request: Any) -> Claim:
    await stage.jobs.submit(job_id, a_request(**request), truncated=(CUT,), terms=terms)
    claim = await stage.jobs.claim("worker", ANY)
    assert isinstance(claim, Claim)
    return claim


async def _house(stage: Backstage) -> str:
    """One job in each of four states, two of a key; the key's id."""
    key = (await stage.keys.create("Ada", frozenset(Scope), 3.0, Allowance(), None)).key.id
    claim = await _claimed(stage, DONE, num_images=1)
    image = ImageRef(index=0, key=f"{DONE}/0.png", seed=7, width=64, height=64, content_type="image/png", bytes=12_345)
    took = Timings(text_s=0.1, batch_s=0.25, steps_s=1.0, decode_wait_s=0.1, decode_s=0.4, compress_s=0.03, put_s=0.01)
    await stage.jobs.renew(claim, 4, JobState.STORING)
    await stage.jobs.succeed(claim, images=[image], cache={"u": Tier.ENCODED}, timings=took, approximate=["tiny_vae"])
    hook = "https://example.com/done"
    terms = Terms(owner=key, weight=3.0, priority=Priority.BATCH, cost_ms=2500, webhook=hook)
    await stage.results.put(INPUT, PNG, "image/png")
    claim = await _claimed(stage, FAILED, prompt=EVIL, terms=terms, image=INPUT, strength=0.5)
    await stage.jobs.fail(claim, BROKEN, retry=True)
    claim = await _claimed(stage, DRAWN, terms=Terms(owner=key))
    await stage.jobs.renew(claim, 2, JobState.RUNNING)
    await stage.jobs.submit(WAITING, a_request("a blue square", num_images=2))
    return key


async def _crowd(stage: Backstage) -> None:
    """Two wait now: one that is allowed has room for another owner's beside it, and for no third."""
    await stage.jobs.submit("b" * 32, a_request())


def rows(told: str) -> dict[str, str]:
    """By its first word, the rest of each line."""
    return {line.split()[0]: " ".join(line.split()[1:]) for line in told.splitlines() if line.strip()}


@pytest.mark.parametrize("columns", [80, 120])
def test_the_list_is_one_line_a_job_with_what_matters(operator: Operator, columns: int) -> None:
    operator.behind(_house)
    code, told, _ = operator("list", columns=columns)
    assert code == 0
    assert max(map(len, told.splitlines())) <= columns
    lines = rows(told)
    assert list(lines) == ["job", WAITING, DRAWN, FAILED, DONE], "newest first"
    assert lines[DRAWN].startswith("running 0 s Ada 2/4 a red")
    assert lines[FAILED].startswith("failed 0 s Ada generation_fai")
    assert lines[WAITING].startswith("queued 0 s a blue squ")


def test_a_long_id_leaves_the_other_columns_their_room(operator: Operator) -> None:
    async def fill(stage: Backstage) -> None:
        await stage.jobs.submit("x" * 64, a_request("a blue square"))

    operator.behind(fill)
    told = operator("list")[1].splitlines()
    assert [line.split() for line in told[1:]] == [["x" * 32, "queued", "0", "s", "a", "blue", "square"], ["x" * 32]]


def test_the_list_is_narrowed_by_state_owner_death_and_number(operator: Operator) -> None:
    key = operator.behind(_house)
    narrowed: dict[tuple[object, ...], list[str]] = {
        ("--dead",): [FAILED],
        ("--state", "queued", "--state", "running"): [WAITING, DRAWN],
        ("--owner", key): [DRAWN, FAILED],
        ("--owner", "Ada", "--state", "failed"): [FAILED],
        ("--owner", "nobody"): [],
        ("-n", 3): [WAITING, DRAWN, FAILED],
    }
    for options, ids in narrowed.items():
        told = json.loads(operator("list", "--json", *options)[1])
        assert [job["id"] for job in told] == ids, options
    assert operator("list", "--state", "cancelled")[1] == "no jobs\n"
    operator.behind(lambda stage: stage.keys.create("Ada", frozenset(Scope), 1.0, Allowance(), None))
    code, _, told = operator("list", "--owner", "Ada")
    assert code == 2
    assert "2 keys have that name" in told


def test_a_long_list_is_read_page_by_page(operator: Operator) -> None:
    async def fill(stage: Backstage) -> None:
        for number in range(120):
            await stage.jobs.submit(f"job{number}", a_request())
            await stage.jobs.cancel(f"job{number}")
            await stage.jobs.submit(f"other{number}", a_request(), terms=Terms(owner="other"))
            await stage.jobs.cancel(f"other{number}")

    operator.behind(fill)
    told = json.loads(operator("list", "--json", "-n", 110, "--owner", "other")[1])
    assert [job["id"] for job in told] == [f"other{number}" for number in range(119, 9, -1)]
    assert len(json.loads(operator("list", "--json", "-n", 1000)[1])) == 240


@pytest.mark.parametrize("columns", [80, 120])
def test_a_job_is_shown_with_all_that_a_person_asks_for(operator: Operator, columns: int) -> None:
    key = operator.behind(_house)
    code, told, _ = operator("show", FAILED, columns=columns)
    assert code == 0
    assert max(len(line.rstrip()) for line in told.splitlines()) <= columns
    assert "\x1b" not in told, "nobody's prompt steers the terminal"
    words = " ".join(told.split())
    for said in (
        f"job {FAILED} failed",
        "why generation_failed: it broke",
        "attempts 1 of 1",
        "prompt a \\x1b[2Jred\\u202e circle\\nover two lines",
        f"starts from {INPUT}, strength 0.5",
        f"ordered by Ada ({key}), batch",
        "predicted 2.5 s of a replica",
        "webhook https://example.com/done: pending",
        "prompt has 80 tokens, 75 fit into clip-l: the rest",
    ):
        assert said in words, said
    done = " ".join(operator("show", DONE, columns=columns)[1].split())
    for said in (
        "text units 0 from memory, 0 from Redis, 1 encoded",
        "text 0.1 s, denoising 1.2 s, decoding 0.5 s, storing 0.0 s, in all",
        f"image {DONE}/0.png, 64 x 64, seed 7, image/png, 12.3 kB",
        "approximate tiny_vae",
    ):
        assert said in done, said
    states = [line.split()[2] for line in operator("show", DONE)[1].splitlines() if line.startswith("20")]
    assert states == ["queued", "encoding", "storing", "succeeded"]
    assert "step 2 of 4" in operator("show", DRAWN)[1]
    assert "1st in the queue" in operator("show", WAITING)[1]


def test_show_as_json_is_the_job_and_its_events(operator: Operator) -> None:
    operator.behind(_house)
    told = json.loads(operator("show", FAILED, "--json")[1])
    assert (told["job"]["id"], told["job"]["request"]["prompt"]) == (FAILED, EVIL)
    assert [event["state"] for event in told["events"]] == ["queued", "encoding", "failed"]


def test_a_job_that_is_not_there_is_one_line(operator: Operator) -> None:
    for command in ("show", "retry", "cancel"):
        for job_id in ("0" * 32, "../etc"):
            code, out, err = operator(command, job_id)
            assert (code, out) == (2, "")
            assert err.startswith("tandem: there is no such job")
            assert err.count("\n") == 1


def test_a_retry_is_a_new_job_that_outlives_the_old(operator: Operator) -> None:
    key = operator.behind(_house)
    code, told, _ = operator("retry", FAILED)
    assert code == 0

    async def look(stage: Backstage) -> tuple[Job, Job, bytes]:
        await stage.results.delete_job(FAILED)
        job = await stage.jobs.get(told.strip())
        assert job.request.image is not None
        return job, await stage.jobs.get(FAILED), await stage.results.get(job.request.image)

    job, old, picture = operator.behind(look)
    assert (job.state, old.state) == (JobState.QUEUED, JobState.FAILED)
    assert (job.owner, job.priority, job.webhook) == (key, Priority.BATCH, "https://example.com/done")
    assert job.request.image is not None
    assert job.request.image.startswith(f"{job.id}/image-")
    assert picture == PNG
    assert dataclasses.replace(job.request, image=old.request.image) == old.request
    assert job.truncated == old.truncated == (CUT,)
    again = operator("retry", FAILED)
    assert again[0] == 2, "what it starts from is gone now"
    assert "the image that the job starts from is gone" in again[2]
    for job_id, state in ((DONE, "succeeded"), (DRAWN, "running"), (WAITING, "queued")):
        code, _, err = operator("retry", job_id)
        assert code == 2
        assert f"is {state}" in err


def test_a_retry_that_has_no_room_leaves_nothing(operator: Operator) -> None:
    operator.behind(_house)
    operator.behind(_crowd)
    full = operator.settings.jobs.model_copy(update={"max_queued": 1})
    operator.settings = operator.settings.model_copy(update={"jobs": full})

    async def try_it(stage: Backstage) -> None:
        await retry(stage.jobs, stage.results, FAILED)

    with pytest.raises(Exception, match="1 jobs are waiting already"):
        operator.behind(try_it)
    assert [path.name for path in (operator.settings.data_dir / "images").iterdir() if path.is_dir()] == [FAILED]


def test_jobs_are_treated_by_the_server_s_own_rules(operator: Operator) -> None:
    """Not by those of the shell that the operator happens to sit in."""

    async def tell(stage: Backstage) -> None:
        rules = {"max_queued": 1, "max_attempts": 7, "queue_ttl_s": 4321.0}
        server = JobStore(stage.settings.jobs.model_copy(update=rules), InProcessMetrics())
        await server.tell_rules()
        await server.close()

    operator.behind(_house)
    operator.behind(_crowd)
    operator.behind(tell)
    assert "attempts 1 of 7" in " ".join(operator("show", FAILED)[1].split())
    code, _, err = operator("retry", FAILED)
    assert code == 2
    assert "1 jobs are waiting already" in err

    async def look(stage: Backstage) -> None:
        rules = stage.settings.jobs
        assert (rules.max_queued, rules.queue_ttl_s) == (1, 4321.0)
        assert rules.redis_url == operator.settings.jobs.redis_url

    operator.behind(look)


@pytest.mark.parametrize("command", [("list",), ("list", "--json"), ("show", "a"), ("retry", "a"), ("cancel", "a")])
def test_who_only_looks_begins_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
) -> None:
    place = tmp_path / "elsewhere"
    monkeypatch.setattr(sys, "argv", ["tandem", "jobs", *command, "--data-dir", str(place)])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr()
    assert (end.value.code, told.out) == (2, "")
    assert told.err == f"tandem: data_dir: nothing there: no server has kept jobs or keys in {place}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--state", "done"), "--state done: there are queued, encoding, running, "),
        (("--state", "queued", "--state", ""), "--state : there are "),
        (("-n", "0"), "-n 0: write a whole number"),
        (("-n", "-1"), "-n -1: write a whole number"),
        (("-n", "many"), "-n many: write a whole number"),
        (("-n", "1.5"), "-n 1.5: write a whole number"),
        (("-n", "9" * 5000), "-n 999"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(operator: Operator, options: tuple[str, ...], named: str) -> None:
    code, out, err = operator("list", *options)
    assert (code, out) == (2, "")
    assert err.startswith(f"tandem: {named}")
    assert err.count("\n") == 1


def test_cancelling(operator: Operator) -> None:
    operator.behind(_house)
    assert operator("cancel", WAITING)[:2] == (0, "cancelled\n")
    assert operator("cancel", DRAWN)[:2] == (0, "running; its worker has been told\n")
    code, _, err = operator("cancel", DONE)
    assert code == 2
    assert "has ended already: succeeded" in err
    assert operator.behind(lambda stage: stage.jobs.get(DONE)).state is JobState.SUCCEEDED


def test_retry_refuses_what_goes_on_or_succeeded(operator: Operator) -> None:
    operator.behind(_house)

    async def refused(stage: Backstage) -> None:
        for job_id, error in ((DONE, InvalidRequest), (DRAWN, InvalidRequest), ("no", JobNotFound)):
            with pytest.raises(error):
                await retry(stage.jobs, stage.results, job_id)

    operator.behind(refused)
