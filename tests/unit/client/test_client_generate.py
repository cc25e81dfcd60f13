"""Both clients, from the order to the pictures: what they bear, what they wait for, what they cancel."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response

from serve.client import AsyncClient, Client, JobFailed, NotTandem, Picture, Progress
from serve.domain.jobs import JobState
from serve.errors import QueueFull, RateLimited

Ask = Callable[..., Any]


@pytest.fixture(params=["blocking", "async"])
def ask(request: pytest.FixtureRequest, script: Any) -> Ask:
    """Calls a method of a client by its name, and returns what it returns."""

    def blocking(method: str, *args: Any, busy_s: float = 0.0, **kwargs: Any) -> Any:
        with Client(script.url, busy_s=busy_s, poll_s=0.01) as client:
            return getattr(client, method)(*args, **kwargs)

    def in_a_loop(*args: Any, **kwargs: Any) -> Any:
        return asyncio.run(told(*args, **kwargs))

    async def told(method: str, *args: Any, busy_s: float = 0.0, **kwargs: Any) -> Any:
        async with AsyncClient(script.url, busy_s=busy_s, poll_s=0.01) as client:
            return await getattr(client, method)(*args, **kwargs)

    return blocking if request.param == "blocking" else in_a_loop


def test_pictures_come_through_lost_answers_and_broken_streams(script: Any, ask: Ask) -> None:
    script.lost, script.cut = 1, [1, 2, 0, 99]
    seen: list[Progress] = []
    pictures: list[Picture] = ask("generate", "a red circle", num_images=2, seed=None, on_progress=seen.append)
    assert [(each.info.index, each.seed, each.reference[-2:]) for each in pictures] == [(0, 5, "/0"), (1, 6, "/1")]
    assert all(each.data.startswith(b"\x89PNG") for each in pictures)
    assert pictures[0].job.state is JobState.SUCCEEDED
    assert script.orders == [{"prompt": "a red circle", "num_images": 2}], "one job, whatever was lost"
    assert script.resumed_after == [None, "1", "3", "3"]
    assert sorted(each.step for each in seen) == [each.step for each in seen]
    assert not script.cancelled.is_set()


def test_a_picture_is_saved(script: Any, ask: Ask, tmp_path: Path) -> None:
    (picture,) = ask("generate", "a red circle")
    picture.save(tmp_path / "circle.png")
    assert (tmp_path / "circle.png").read_bytes() == picture.data


def test_a_job_that_failed_says_why(script: Any, ask: Ask) -> None:
    script.end = "failed"
    with pytest.raises(JobFailed, match="not enough memory") as failed:
        ask("generate", "a red circle")
    assert (failed.value.code, failed.value.job.state) == ("out_of_memory", JobState.FAILED)


def test_a_busy_server_is_asked_again_when_it_said(script: Any, ask: Ask) -> None:
    script.busy = 3
    assert ask("encode", "a red circle", busy_s=30).model == "shapes"
    assert len(script.texts) == 1
    script.busy = 1
    with pytest.raises(Exception, match="does not answer"):
        ask("encode", "a red circle", busy_s=0)


@pytest.mark.parametrize(
    ("status", "code", "kind"), [(503, "queue_full", QueueFull), (429, "rate_limited", RateLimited)]
)
def test_nobody_waits_longer_than_they_said(
    script: Any, ask: Ask, status: int, code: str, kind: type[Exception]
) -> None:
    error = {"message": "later", "type": "x", "param": None, "code": code}
    script.refusal = JSONResponse({"error": error}, status, {"Retry-After": "3600"})
    began = time.monotonic()
    with pytest.raises(kind):
        ask("generate", "a red circle", busy_s=60)
    assert time.monotonic() - began < 10


def test_whoever_stops_waiting_cancels_the_job(script: Any) -> None:
    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with Client(script.url, poll_s=0.01) as client, pytest.raises(KeyboardInterrupt):
        client.generate("a red circle", on_progress=interrupt)
    assert script.cancelled.is_set()


def test_a_task_that_is_cancelled_cancels_its_job(script: Any) -> None:
    script.hang = True

    async def story() -> None:
        async with AsyncClient(script.url, poll_s=0.01) as client:
            task = asyncio.create_task(client.generate("a red circle"))
            await asyncio.to_thread(script.following.wait, 10)
            task.cancel()
            await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(story())
    assert script.cancelled.is_set()


def test_an_iterator_that_is_left_ends_its_stream(script: Any) -> None:
    with Client(script.url, poll_s=0.01) as client:
        job = client.submit("a red circle")
        events = client.follow(job)
        assert next(events).step == 1
        events.close()
        assert [each.state.value for each in client.follow(job)][-1] == "succeeded"
        assert script.resumed_after == [None, None]


def test_the_blocking_client_works_where_an_event_loop_runs(script: Any) -> None:
    """As in a notebook."""

    async def story() -> list[Picture]:
        with Client(script.url, poll_s=0.01) as client:
            return client.generate("a red circle")

    assert len(asyncio.run(story())) == 1


def test_both_have_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient)
    for name in public(Client):
        assert getattr(Client, name).__doc__ == getattr(AsyncClient, name).__doc__


@pytest.mark.parametrize(
    "answer",
    [
        Response("{", media_type="application/json"),
        JSONResponse({"id": "x"}),
        JSONResponse([]),
        JSONResponse({"state": 7}),
    ],
)
def test_an_answer_that_is_none_is_told_as_one(script: Any, ask: Ask, answer: Response) -> None:
    script.refusal = answer
    with pytest.raises(NotTandem):
        ask("get", "0" * 32)
    with pytest.raises(NotTandem):
        ask("submit", "a red circle")
