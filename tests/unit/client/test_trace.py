"""`tandem trace`: a job's stages on its time line, as far as they are known, in a terminal and in a pipe."""

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from serve.stages import STAGES

TIMINGS = {
    "admission_s": 0.004,
    "queued_s": 0.120,
    "claim_s": 0.002,
    "text_s": 0.012,
    "text_from": "redis",
    "batch_s": 0.030,
    "steps_s": 0.180,
    "decode_wait_s": 0.004,
    "decode_s": 0.044,
    "compress_s": 0.008,
    "put_s": 0.002,
    "total_s": 0.406,
    "told_s": 0.002,
    "ahead_s": 0.020,
    "batch_images": 3.25,
}
ENDED, QUEUED, RUNNING, RETRIED, CANCELLED, UNKNOWN = (digit * 32 for digit in "012345")


def view(job_id: str, state: str, timings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """As GET /v1/jobs/{id} tells it."""
    usual = {
        "id": job_id,
        "state": state,
        "step": 20,
        "steps": 20,
        "attempt": 1,
        "position": None,
        "eta_s": None,
        "request": {"model": "shapes", "seed": 1, "width": 64, "height": 96, "num_images": 1},
        "timings": timings,
        "cache": {"memory": 1, "redis": 1, "encoded": 0},
        "truncated": [],
        "images": [],
        "error": None,
    }
    return usual | changes


JOBS = {
    ENDED: view(ENDED, "succeeded", TIMINGS),
    QUEUED: view(QUEUED, "queued", {"admission_s": 0.004}, position=3, eta_s=12.0, attempt=0, step=0, cache=None),
    RUNNING: view(RUNNING, "running", {"admission_s": 0.004, "queued_s": 3.2}, step=7, cache=None),
    RETRIED: view(RETRIED, "succeeded", TIMINGS | {"retried_s": 1.0, "total_s": 1.402}, attempt=2),
    CANCELLED: view(CANCELLED, "cancelled", {"total_s": None}, cache=None),
}
Run = Callable[..., int]


class Server:
    """Jobs that are known, two to a page."""

    def __init__(self) -> None:
        self.queries: list[dict[str, str]] = []
        self.app = Starlette(routes=[Route("/v1/jobs/{id}", self.get), Route("/v1/jobs", self.list)])
        self.url = ""

    async def get(self, request: Request) -> JSONResponse:
        job = JOBS.get(request.path_params["id"])
        error = {"message": "there is no such job", "type": "x", "param": None, "code": "not_found"}
        return JSONResponse(job, 200) if job else JSONResponse({"error": error}, 404)

    async def list(self, request: Request) -> JSONResponse:
        self.queries.append(dict(request.query_params))
        ids = [ENDED, RETRIED, ENDED]
        first = int(request.query_params.get("cursor", 0))
        number = min(2, int(request.query_params["limit"]))
        following = str(first + number) if first + number < len(ids) else None
        page = [JOBS[each] for each in ids[first : first + number]]
        return JSONResponse({"object": "list", "data": page, "next": following})


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    told = Server()
    http = uvicorn.Server(uvicorn.Config(told.app, port=0, log_level="warning", lifespan="off"))
    listener = http.config.bind_socket()
    listener.listen()
    told.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]})
    thread.start()
    yield told
    http.should_exit = True
    thread.join()


@pytest.fixture
def trace(server: Server, tandem: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `tandem trace` at 80 columns; its exit code, its output and its errors."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> tuple[int, str, str]:
        code = tandem("trace", *arguments, "--url", server.url)
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def rows(text: str) -> dict[str, tuple[str, int, int]]:
    """Stage -> (milliseconds, where its bar begins, how long it is) of a chart."""
    lines = text.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("stage"))
    left = 32 if "share" in lines[head] else 23
    found = {}
    for line in lines[head + 1 :]:
        bar = line.rstrip()[left:]
        if bar and not bar.strip("█░▒╳ #=?-"):
            begin = len(bar) - len(bar.lstrip())
            found[line[:11].strip()] = (line[13:21].strip(), begin, len(bar.strip()))
    return found


def test_the_stages_of_an_ended_job_follow_one_another(trace: Any) -> None:
    code, text, _ = trace(ENDED)
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    chart = rows(text)
    order = [
        "admission",
        "queued",
        "ahead",
        "claim",
        "text",
        "batch",
        "steps",
        "decode wait",
        "decode",
        "compress",
        "put",
    ]
    assert list(chart) == [*order, "in no stage", "told"]
    assert chart["queued"][0] == "120.0"
    in_turn = [place for name, place in chart.items() if name != "ahead"]
    assert all(before[1] <= after[1] for before, after in pairwise(in_turn))
    assert max(chart, key=lambda name: chart[name][2]) == "steps"
    assert chart["steps"][2] / chart["queued"][2] == pytest.approx(1.5, abs=0.15)
    assert chart["ahead"][1] == 0  # it began when the job was logged, beside the wait
    assert "job 00000000000000000000000000000000  succeeded" in text
    assert "shapes, 64 x 96, 20 steps" in text
    assert "1 from memory, 1 from Redis, 0 encoded; read from Redis" in text
    assert "3.2 images shared one on average" in text
    assert " 43.7 %" in text  # 180 of 412
    said = " ".join(text.split())
    assert "explains 99.0 % of 412.0 ms; 4.0 ms are in no stage: the job's settlement, and turns" in said


def test_what_is_known_of_a_job_that_has_not_ended(trace: Any) -> None:
    code, text, _ = trace(QUEUED)
    assert (code, list(rows(text))) == (0, ["admission"])
    assert "3rd in the queue, about 12 s" in text
    code, text, _ = trace(RUNNING)
    assert list(rows(text)) == ["admission", "queued"]
    assert "running, step 7 of 20" in text
    assert "3,204.0 ms so far are told of; it has not ended" in text
    assert "%" not in text
    assert "nothing is told of it yet" in trace(CANCELLED)[1]


def test_a_retried_job_says_so(trace: Any) -> None:
    _, text, _ = trace(RETRIED)
    assert rows(text)["retried"][0] == "1,000.0"
    assert "attempt     2" in text


def test_json_has_every_stage_and_where_it_lies(trace: Any) -> None:
    _, text, _ = trace(ENDED, "--json")
    told = json.loads(text)
    bars = {bar["stage"]: bar for bar in told["stages"]}
    assert list(bars) == [name for name in STAGES if f"{name}_s" in TIMINGS]
    assert {name: bar["seconds"] for name, bar in bars.items()} == {name: TIMINGS[f"{name}_s"] for name in bars}
    assert bars["queued"]["starts_s"] == 0.004
    assert bars["told"]["starts_s"] == pytest.approx(0.410)
    assert told["wall_s"] == pytest.approx(0.412)
    assert told["explained"] == pytest.approx(0.408 / 0.412)
    assert told["unexplained_s"] == pytest.approx(0.004)
    assert (told["text_from"], told["ahead_s"], told["batch_images"]) == ("redis", 0.02, 3.25)
    assert (told["attempt"], told["cache"]) == (1, {"memory": 1, "redis": 1, "encoded": 0})
    _, text, _ = trace(RUNNING, "--json")
    told = json.loads(text)
    assert (told["wall_s"], told["explained"], told["unexplained_s"], told["cache"]) == (None, None, None, None)


def test_several_jobs_come_to_the_mean_of_each_stage(trace: Any) -> None:
    code, text, _ = trace(ENDED, RETRIED, RUNNING)
    assert code == 0
    cells = {line[:13].strip(): line[13:].split() for line in text.splitlines()}
    assert cells["queued"][:2] == ["2", "120.0"]
    assert cells["retried"] == ["1", "500.0", "54.9", "%", "1,000.0"]
    assert "2 jobs, 910.0 ms on average; explains 99.8 % of it" in text
    assert "1 more has not ended" in text
    told = json.loads(trace(ENDED, RETRIED, RUNNING, "--json")[1])
    assert (told["ended"], len(told["jobs"])) == (2, 3)
    assert told["mean_s"]["retried"] == 0.5
    assert told["mean_wall_s"] == pytest.approx(0.910)
    assert told["explained"] == pytest.approx(1 - 0.004 / 1.820)


def test_the_newest_that_succeeded_page_by_page(trace: Any, server: Server) -> None:
    server.queries.clear()
    _, text, _ = trace("--last", 3)
    assert "3 jobs, " in text
    assert server.queries == [{"state": "succeeded", "limit": "3"}, {"state": "succeeded", "limit": "1", "cursor": "2"}]
    assert "3 jobs, " in trace("--last", 500)[1]
    assert len(json.loads(trace("--last", 1, "--json")[1])["jobs"]) == 1
    assert trace(CANCELLED, QUEUED)[1] == "2 more have not ended\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((UNKNOWN,), "tandem: there is no such job\n"),
        ((ENDED, UNKNOWN), "tandem: there is no such job\n"),
        (("../../cache",), "tandem: trace ../../cache: a job's id has 32 hex digits\n"),
        ((), "tandem: trace: name jobs by their ids, or say --last N\n"),
        ((ENDED, "--last", "3"), "tandem: trace: name jobs by their ids, or say --last N\n"),
    ],
)
def test_a_mistake_is_one_line(trace: Any, arguments: tuple[str, ...], words: str) -> None:
    assert trace(*arguments) == (2, "", words)


def test_a_server_that_is_not_there_is_one_line(tandem: Run, nowhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tandem("trace", ENDED, "--url", nowhere) == 2
    assert capsys.readouterr().err.startswith(f"tandem: no server answers at {nowhere}")


def test_a_pipe_gets_no_colours_and_an_old_terminal_no_blocks(server: Server) -> None:
    command = [sys.executable, "-m", "serve.cli", "trace", ENDED, "--url", server.url]
    plain = {**os.environ, "COLUMNS": "60", "PYTHONIOENCODING": "ascii"}
    piped = subprocess.run(command, capture_output=True, env=plain, check=True, timeout=60)
    assert b"\x1b" not in piped.stdout
    assert piped.stderr == b""
    text = piped.stdout.decode("ascii")
    assert "###" in text
    assert max(map(len, text.splitlines())) <= 60

    master, slave = pty.openpty()
    coloured = {**os.environ, "COLUMNS": "80", "TERM": "xterm-256color"}
    subprocess.run(command, stdout=slave, stderr=slave, env=coloured, check=True, timeout=60)
    os.close(slave)
    shown = b""
    while chunk := _read(master):
        shown += chunk
    os.close(master)
    assert b"\x1b[36m" in shown
    assert "░".encode() in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # its other end is closed
        return b""
