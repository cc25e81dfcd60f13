"""The table of statuses, the shape of every error, and the middleware, on an app whose only routes fail on purpose."""

import asyncio
import dataclasses
import inspect
import pickle
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from serve import errors, service
from serve.api.errors import STATUS, StillRunning, install
from serve.api.middleware import BodyLimit, RequestIds, release_body
from serve.api.ratelimits import UNITS
from serve.api.streams import TooManyStreams
from serve.callers import Allowance, Limit
from serve.settings.front import HttpSettings
from serve.settings.orders import LimitSettings

TREE = [
    each
    for each in (*vars(errors).values(), *vars(service).values(), TooManyStreams, StillRunning)
    if inspect.isclass(each) and issubclass(each, errors.TandemError)
]
EXPECTED = {
    errors.TandemError: 500,
    errors.ClientError: 400,
    errors.InvalidRequest: 422,
    errors.Conflict: 422,
    errors.PayloadTooLarge: 413,
    errors.ModelNotFound: 404,
    errors.JobNotFound: 404,
    errors.JobGone: 410,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.UnsupportedMediaType: 415,
    errors.Unavailable: 503,
    errors.RateLimited: 429,
    errors.QueueFull: 503,
    errors.BackendUnavailable: 503,
    errors.GenerationFailed: 500,
    errors.NotFinite: 500,
    errors.OutOfMemory: 500,
    errors.DeviceLost: 500,
    errors.LeaseLost: 500,
    errors.OperatorError: 500,
    service.NotOffered: 404,
    service.Busy: 429,
    TooManyStreams: 429,
    StillRunning: 504,
}
LIMIT = 1000


def failing_app(error: Exception | None = None) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    install(app)
    app.add_middleware(BodyLimit, max_bytes=LIMIT, max_bodies_bytes=2 * LIMIT)
    app.add_middleware(RequestIds)

    @app.get("/fail")
    async def fail() -> None:
        assert error is not None
        raise error

    @app.get("/fail-late")
    async def fail_late() -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"begun"
            raise RuntimeError("secret")

        return StreamingResponse(body())

    @app.post("/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())

    @app.post("/hold")
    async def hold(request: Request) -> int:
        size = len(await request.body())
        if request.query_params.get("release"):
            release_body(request)
            assert not hasattr(request, "_body")
        app.state.holding.release()
        await app.state.go_on.wait()
        return size

    return app


async def call(app: FastAPI, method: str, path: str, **kwargs: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.request(method, path, **kwargs)


def ask(app: FastAPI, method: str, path: str, **kwargs: Any) -> httpx.Response:
    return asyncio.run(call(app, method, path, **kwargs))


def error_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.headers["x-request-id"]
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_the_expectations_cover_the_tree_and_the_table_has_only_its_classes() -> None:
    assert set(EXPECTED) == set(TREE)
    assert set(STATUS) <= set(TREE)


@pytest.mark.parametrize("kind", TREE)
def test_each_class_has_its_status_and_shape(kind: type[errors.TandemError]) -> None:
    answer = ask(failing_app(kind("the reason", "the.field")), "GET", "/fail")
    error = error_of(answer)
    assert answer.status_code == EXPECTED[kind]
    if kind in (errors.TandemError, errors.LeaseLost, errors.OperatorError):
        assert "the reason" not in answer.text
        assert (error["type"], error["param"], error["code"]) == ("server_error", None, "internal_error")
    else:
        assert (error["message"], error["param"], error["code"]) == ("the reason", "the.field", kind.code)


def test_a_pickled_error_answers_the_same() -> None:
    sent = errors.QueueFull("the queue is full", "jobs.max_queued", 2.2)
    answer = ask(failing_app(pickle.loads(pickle.dumps(sent))), "GET", "/fail")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "3"
    assert answer.headers["x-should-retry"] == "false"


def test_a_caller_over_the_own_limits_is_told_all_of_them() -> None:
    limits = (
        Limit(name="requests_per_minute", limit=60, remaining=0, reset_s=59.2, window_s=60),
        Limit(name="engine_s_per_day", limit=3600, remaining=12, reset_s=86000.0, window_s=86400),
        Limit(name="max_unfinished", limit=4, remaining=1),
    )
    sent = errors.RateLimited("more than 60 orders a minute", None, 0.4, limits)
    answer = ask(failing_app(pickle.loads(pickle.dumps(sent))), "GET", "/fail")
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["ratelimit-policy"] == (
        '"requests_per_minute";q=60;qu="requests";w=60, "engine_s_per_day";q=3600;qu="engine-seconds";w=86400, '
        '"max_unfinished";q=4;qu="concurrent-requests"'
    )
    assert answer.headers["ratelimit"] == (
        '"requests_per_minute";r=0;t=60, "engine_s_per_day";r=12;t=86000, "max_unfinished";r=1'
    )
    bare = ask(failing_app(errors.RateLimited("no")), "GET", "/fail")
    assert not {"ratelimit", "ratelimit-policy"} & set(bare.headers), "a field must not be empty"


def test_every_limit_has_a_unit() -> None:
    assert set(UNITS) == {field.name for field in dataclasses.fields(Allowance)}


def test_whoever_lacks_a_key_is_told_how_one_is_sent() -> None:
    answer = ask(failing_app(errors.Unauthorized("no key")), "GET", "/fail")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert "www-authenticate" not in ask(failing_app(errors.Forbidden("no")), "GET", "/fail").headers


def test_a_backend_that_is_away_may_be_retried() -> None:
    answer = ask(failing_app(errors.BackendUnavailable("away")), "GET", "/fail")
    assert answer.headers["retry-after"] == "1"
    assert "x-should-retry" not in answer.headers
    assert error_of(answer)["type"] == "unavailable_error"


def test_an_unexpected_exception_is_a_500_that_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    answer = ask(
        failing_app(RuntimeError("redis://:password@host")), "GET", "/fail", headers={"x-request-id": "mine-1"}
    )
    assert answer.status_code == 500
    assert "password" not in answer.text
    assert error_of(answer)["code"] == "internal_error"
    assert answer.headers["x-request-id"] == "mine-1"
    assert [record.request_id for record in caplog.records] == ["mine-1"]  # type: ignore[attr-defined]


def test_an_answer_that_has_begun_is_cut() -> None:
    with pytest.raises(RuntimeError, match="secret"):
        ask(failing_app(), "GET", "/fail-late")


@pytest.mark.parametrize("given", ["", "x" * 129, "two words", "a\tb", "{}"])
def test_a_request_id_that_is_not_decent_is_replaced(given: str) -> None:
    answer = ask(failing_app(), "GET", "/nowhere", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] != given
    assert len(answer.headers["x-request-id"]) == 32


def test_unknown_routes_and_methods_have_the_shape() -> None:
    missing = ask(failing_app(), "GET", "/nowhere")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")
    wrong = ask(failing_app(), "DELETE", "/fail")
    assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "GET"


def test_a_body_at_the_limit_passes_and_one_over_it_does_not() -> None:
    assert ask(failing_app(), "POST", "/echo", content=b"x" * LIMIT).json() == LIMIT
    for path in ("/echo", "/nowhere"):
        answer = ask(failing_app(), "POST", path, content=b"x" * (LIMIT + 1))
        assert (answer.status_code, error_of(answer)["param"]) == (413, "body")


@pytest.mark.parametrize("length", ["9" * 5000, "1001"])
def test_an_announced_length_is_refused_before_the_body_is_read(length: str) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("read")
        yield b""

    answer = ask(failing_app(), "POST", "/echo", content=body(), headers={"content-length": length})
    assert answer.status_code == 413


def test_a_chunked_body_is_read_only_up_to_the_limit() -> None:
    sent = []

    async def body() -> AsyncIterator[bytes]:
        for chunk in range(1000):
            sent.append(chunk)
            yield b"x" * 100

    answer = ask(failing_app(), "POST", "/echo", content=body())
    assert "content-length" not in answer.request.headers
    assert (answer.status_code, error_of(answer)["code"]) == (413, "payload_too_large")
    assert len(sent) <= LIMIT / 100 + 2


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    for place in range(0, len(data), 100):
        yield data[place : place + 100]


@pytest.mark.parametrize("announced", [True, False])
def test_the_bodies_of_all_requests_have_one_bound(announced: bool) -> None:
    async def story() -> None:
        app = failing_app()
        app.state.holding, app.state.go_on = asyncio.Semaphore(0), asyncio.Event()
        body = b"x" * LIMIT

        async def post(path: str) -> httpx.Response:
            return await call(app, "POST", path, content=body if announced else chunks(body))

        held = [asyncio.create_task(post("/hold")) for _ in range(2)]
        for _ in held:
            await app.state.holding.acquire()
        refused = await post("/echo")
        assert (refused.status_code, error_of(refused)["code"]) == (503, "unavailable")
        assert (error_of(refused)["param"], refused.headers["retry-after"]) == ("body", "1")
        assert (await call(app, "POST", "/echo")).json() == 0  # what has no body needs no room
        app.state.go_on.set()
        assert [answer.json() for answer in await asyncio.gather(*held)] == [LIMIT, LIMIT]
        assert (await post("/echo")).json() == LIMIT

    asyncio.run(story())


def test_a_body_that_its_route_has_let_go_of_does_not_count() -> None:
    async def story() -> None:
        app = failing_app()
        app.state.holding, app.state.go_on = asyncio.Semaphore(0), asyncio.Event()
        held = []
        for _ in range(5):
            held.append(asyncio.create_task(call(app, "POST", "/hold?release=1", content=b"x" * LIMIT)))
            await app.state.holding.acquire()
        app.state.go_on.set()
        assert [answer.json() for answer in await asyncio.gather(*held)] == [LIMIT] * 5

    asyncio.run(story())


def test_what_one_order_may_hold_fits_into_its_body_and_that_into_all() -> None:
    http, limits = HttpSettings(), LimitSettings()
    assert 2 * 4 * -(-limits.max_image_bytes // 3) + 2 * limits.max_prompt_bytes + 65536 < http.max_body_bytes
    with pytest.raises(ValidationError, match="max_bodies_bytes"):
        HttpSettings(max_body_bytes=2000, max_bodies_bytes=1999)


def test_a_body_that_fails_gives_its_room_back() -> None:
    async def story() -> None:
        app = failing_app()
        for _ in range(5):
            assert (await call(app, "POST", "/echo", content=chunks(b"x" * 2 * LIMIT))).status_code == 413
        assert (await call(app, "POST", "/echo", content=b"x" * LIMIT)).json() == LIMIT

    asyncio.run(story())


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/nothing", {"error"}),
        ("/sdapi/v1/nothing", {"error", "detail", "body", "errors", "param"}),
        ("/internal/nothing", {"error", "detail", "body", "errors", "param"}),
        ("/status/nothing", {"detail", "param"}),
        ("/statuses", {"error"}),
    ],
)
def test_each_dialect_words_errors_its_own_way(path: str, fields: set[str]) -> None:
    for method in ("GET", "POST"):
        assert set(ask(failing_app(), method, path).json()) == fields
