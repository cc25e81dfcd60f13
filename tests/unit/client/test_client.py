"""The client against a server that breaks streams, refuses, is full, is something else, or is not there."""

import asyncio
from typing import Any

import pytest
from starlette.responses import HTMLResponse, JSONResponse, Response

from serve.cli.client import Client, local_url
from serve.client import AsyncClient, NotTandem, Pool, Progress
from serve.domain.jobs import JobState
from serve.domain.text import CacheReport, Truncation
from serve.errors import (
    ClientError,
    Forbidden,
    GenerationFailed,
    InvalidRequest,
    JobNotFound,
    OperatorError,
    QueueFull,
    RateLimited,
    Unauthorized,
    Unavailable,
)
from serve.settings.front import HttpSettings

pytestmark = pytest.mark.anyio
STEPS = 4


def client(url: str, patience_s: float = 5.0, busy_s: float = 0.0) -> AsyncClient:
    return AsyncClient(url, patience_s=patience_s, busy_s=busy_s, poll_s=0.01)


async def followed(script: Any) -> list[Progress]:
    async with client(script.url) as server:
        job = await server.submit("a red circle", seed=None)
        return [progress async for progress in server.follow(job.id)]


def refusal(status: int, param: str | None = None, **headers: str) -> Response:
    error = {"message": "the reason", "type": "x", "param": param, "code": "x"}
    return JSONResponse({"error": error}, status, headers)


async def test_a_job_is_followed_step_by_step(script: Any) -> None:
    progress = await followed(script)
    assert [(p.state.value, p.step) for p in progress] == [*(("running", n) for n in range(1, 5)), ("succeeded", 4)]
    assert script.resumed_after == [None]
    assert script.orders == [{"prompt": "a red circle"}], "what is None is left to the server's default"


async def test_a_broken_stream_resumes_after_the_last_event(script: Any) -> None:
    script.cut = [1, 2, 0, 99]
    steps = [p.step for p in await followed(script)]
    assert script.resumed_after == [None, "1", "3", "3"]
    assert sorted(steps) == steps
    assert set(steps) == {1, 2, 3, 4}


async def test_without_any_stream_the_job_is_polled(script: Any) -> None:
    script.streams = False
    progress = await followed(script)
    assert [p.step for p in progress] == [1, 2, 3, 4, 4]
    assert progress[-1].state is JobState.SUCCEEDED


async def test_a_server_that_goes_away_is_borne_for_a_while_only(nowhere: str) -> None:
    async with client(nowhere, patience_s=0.1) as server:
        with pytest.raises(OperatorError, match="no server answers"):
            async for _ in server.follow("0" * 32):
                pass


async def test_a_job_that_is_forgotten_ends_the_following_at_once(script: Any) -> None:
    async with client(script.url, patience_s=60) as server:
        job = await server.submit("a red circle")
        script.refusal = refusal(404, "job_id")
        with pytest.raises(JobNotFound):
            async for _ in server.follow(job.id):
                pass


async def test_the_finished_job_tells_everything(script: Any) -> None:
    async with client(script.url) as server:
        job = await server.submit("a red circle", num_images=2)
        async for _ in server.follow(job.id):
            pass
        job = await server.get(job.id)
        assert (job.state, len(job.images), job.timings.total_s) == (JobState.SUCCEEDED, 2, 1.5)
        assert (job.model, job.seed) == ("shapes", 5)
        assert job.cache == CacheReport(memory=1, encoded=1)
        assert job.truncated == (Truncation(field="prompt", encoder="clip-l", tokens=80, limit=75, text=" and more"),)
        assert (await server.image(job.id, 1)).startswith(b"\x89PNG"), "the redirect to the store is followed"


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (refusal(422, "seed"), InvalidRequest, "seed: the reason"),
        (refusal(400), ClientError, "the reason"),
        (refusal(404, "model"), JobNotFound, "the reason"),
        (refusal(500), GenerationFailed, "the reason"),
        (refusal(401), Unauthorized, "the reason"),
        (refusal(403), Forbidden, "the reason"),
        (refusal(429), RateLimited, "the reason"),
        (HTMLResponse("<h1>It works!</h1>", 404), NotTandem, "is not a Tandem server"),
        (JSONResponse(["x"], 503), NotTandem, "is not a Tandem server"),
    ],
)
async def test_a_refusal_becomes_the_error_that_it_is(
    script: Any, answer: Response, error: type[Exception], message: str
) -> None:
    script.refusal = answer
    async with client(script.url) as server:
        with pytest.raises(error, match=message):
            await server.submit("")


async def test_a_full_server_says_when_to_come_back(script: Any) -> None:
    script.refusal = refusal(503, **{"Retry-After": "7"})
    async with client(script.url) as server:
        with pytest.raises(Unavailable) as full:
            await server.submit("a red circle")
    assert full.value.retry_after_s == 7


async def test_an_order_whose_answer_was_lost_is_sent_again_under_its_key(script: Any) -> None:
    script.lost = 2
    async with client(script.url) as server:
        await server.submit("a red circle")
        await server.submit("a red circle")
    assert len(script.orders) == 2, "one for each call"
    first, *again, other = script.idempotency_keys
    assert again == [first, first]
    assert other not in (None, first)


async def test_an_order_that_was_lost_is_given_up_after_a_while_and_said_to_be_uncertain(script: Any) -> None:
    script.lost = 10**6
    async with client(script.url, patience_s=0.1) as server:
        with pytest.raises(OperatorError, match="may be queued all the same"):
            await server.submit("a red circle")
    assert len(script.orders) == 1


async def test_a_full_queue_is_an_answer_to_an_order_that_was_lost(script: Any) -> None:
    error = {"message": "100 jobs are waiting already", "type": "x", "param": None, "code": "queue_full"}
    script.lost, script.after_loss = 1, JSONResponse({"error": error}, 503, {"Retry-After": "7"})
    async with client(script.url, patience_s=60) as server:
        with pytest.raises(QueueFull, match="100 jobs"):
            await server.submit("a red circle")


async def test_nothing_is_sent_again_to_a_server_that_is_not_there(nowhere: str) -> None:
    async with client(nowhere, patience_s=60) as server:
        with pytest.raises(OperatorError, match="no server answers"):
            await asyncio.wait_for(server.submit("a red circle"), 10)


async def test_the_key_goes_with_every_request(script: Any) -> None:
    script.key = "tdm_abc_def"
    async with AsyncClient(script.url, f" {script.key}\n", poll_s=0.01) as server:
        job = await server.submit("a red circle")
        async for _ in server.follow(job.id):
            pass
        await server.get(job.id)
        await server.image(job.id, 0)
        await server.encode("a red circle")
        await server.cache()
    assert script.shown_keys == {"Bearer tdm_abc_def"}
    async with client(script.url) as server:
        with pytest.raises(Unauthorized):
            await server.submit("a red circle")


@pytest.mark.parametrize("key", ["tdm_a b", "tdm_\n x", "ключ", "a\x00b"])
async def test_what_can_be_no_key_is_refused_and_not_repeated(key: str) -> None:
    for kind, name in ((AsyncClient, "key"), (Client, "--key or TANDEM_KEY")):
        with pytest.raises(OperatorError, match=f"^{name}: that is not an API key") as refused:
            kind("http://127.0.0.1", key)
        assert key not in str(refused.value)


async def test_pools_are_told_ready_or_not_and_nothing_else_is_mistaken_for_a_server(script: Any, nowhere: str) -> None:
    async with client(script.url) as server:
        assert await server.pools() == (Pool(name="diffusion", ready=True, detail=""),)
        script.pools["diffusion"] = {"ready": False, "detail": "loading"}
        assert await server.pools() == (Pool(name="diffusion", ready=False, detail="loading"),)
        script.pools = {}
    async with client(f"{script.url}/v1") as elsewhere, client(nowhere) as nobody:
        assert await elsewhere.pools() is None
        assert await nobody.pools() is None


async def test_the_environment_s_proxy_is_not_asked_for_loopback(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert len(await asyncio.wait_for(followed(script), 5)) == STEPS + 1


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "http://[::bad", "http://x:99999"])
async def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(OperatorError, match="is not an http"):
        AsyncClient(url)


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80")],
)
def test_the_local_address_can_be_connected_to(host: str, url: str) -> None:
    assert local_url(HttpSettings(host=host, port=80)) == url
