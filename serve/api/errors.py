"""Errors as HTTP: one table from error class to status, one shape for every body.

    {"error": {"message": str, "type": str, "param": str | null, "code": str}}

The dialects of others word it as their clients expect it (`serve.api.dialects`). `type` says whose turn it is:
`invalid_request_error` the client's, `unavailable_error` the same request later, `server_error` the operator's. `param`
names the field at fault. Nothing that an exception from elsewhere says gets out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from serve import errors, service
from serve.api import ratelimits, streams
from serve.api.dialects import ErrorBody, ErrorDetail, error_body
from serve.telemetry.logs import escape

log = logging.getLogger(__name__)

_HTTP_CODES = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}
_INTERNAL = "internal error; the server's log has the details"
_MAX_PARAM = 100


class StillRunning(errors.TandemError):
    """A synchronous call that takes longer than connections are held open for. Its job goes on, at `location`."""

    code = "still_running"
    location = ""


class JobEnded(errors.TandemError):
    """The job of a synchronous call ended without pictures; `status` says whose fault it was."""

    def __init__(self, message: str, code: str, status: int) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


STATUS: Mapping[type[errors.TandemError], int] = {
    errors.ClientError: 400,
    errors.InvalidRequest: 422,
    errors.PayloadTooLarge: 413,
    errors.UnsupportedMediaType: 415,
    errors.ModelNotFound: 404,
    errors.JobNotFound: 404,
    errors.JobGone: 410,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    service.NotOffered: 404,
    service.Busy: 429,
    streams.TooManyStreams: 429,
    errors.Unavailable: 503,
    errors.RateLimited: 429,
    errors.GenerationFailed: 500,
    StillRunning: 504,
}
"""Subclasses follow their nearest ancestor. A class without one here is internal: a 500 whose message stays inside."""


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that is likely to answer with these error statuses. Any other error looks the same."""
    listed: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": HTTPStatus(status).phrase} for status in statuses
    }
    return listed | {"default": {"model": ErrorBody, "description": "Any other error"}}


def detail(status: int, message: str, code: str, param: str | None = None) -> ErrorDetail:
    """`param` may be a key that the client invented: it is escaped and cut."""
    later = "unavailable_error" if status in (429, 503) else None
    kind = later or ("invalid_request_error" if status < 500 else "server_error")
    return ErrorDetail(message=message, type=kind, code=code, param=param and escape(param)[:_MAX_PARAM])


def respond(
    scope: Scope,
    status: int,
    message: str,
    code: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """`scope` is the request's: its path says which dialect it speaks."""
    return _answer(scope, status, detail(status, message, code, param), headers)


def _answer(scope: Scope, status: int, error: ErrorDetail, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error_body(scope, error), status_code=status, headers=headers)


def internal_error(scope: Scope) -> JSONResponse:
    return respond(scope, 500, _INTERNAL, errors.TandemError.code)


def install(app: FastAPI) -> None:
    app.add_exception_handler(errors.TandemError, _tandem_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


def public(error: errors.TandemError) -> tuple[int, ErrorDetail]:
    """Status and body of an error of ours. An internal one is logged and answered without its message."""
    if isinstance(error, JobEnded):
        return error.status, detail(error.status, error.message, error.code)
    status = status_of(type(error))
    if status is None:
        log.error("internal error reached the client: %s", error, exc_info=error)
        return 500, detail(500, _INTERNAL, errors.TandemError.code)
    return status, detail(status, error.message, error.code, error.param)


def status_of(kind: type[errors.TandemError]) -> int | None:
    """None of what is internal."""
    return next((STATUS[each] for each in kind.__mro__ if each in STATUS), None)


def respond_to(error: errors.TandemError, scope: Scope) -> JSONResponse:
    status, body = public(error)
    headers: dict[str, str] = {}
    if status in (429, 503):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s or 1))
    if isinstance(error, errors.QueueFull | StillRunning | JobEnded):
        # Clients that retry at once would triple the load of a server that has just said that it is full, or ask again
        # for what has been tried, or goes on.
        headers["x-should-retry"] = "false"
    if isinstance(error, StillRunning):
        headers["Location"] = error.location
    if isinstance(error, errors.RateLimited):
        headers |= ratelimits.headers(error.limits)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _answer(scope, status, body, headers)


async def _tandem_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.TandemError)
    return respond_to(error, request.scope)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    """The first thing wrong with the request: unreadable JSON 400, a path that names nothing 404 (one that was to name
    something new 422), a bad field 422."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place, *fields = (str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return respond(request.scope, 400, f"the body is not JSON: {first['ctx']['error']}", "invalid_json", "body")
    if isinstance(first["input"], bytes):
        return respond(
            request.scope, 415, "send JSON, with Content-Type: application/json", "unsupported_media_type", "body"
        )
    # Of a query parameter that came several times, it does not matter which is wrong.
    param = ".".join(fields[:1] if place == "query" else fields) or place
    if place == "path" and request.method != "PUT":
        return respond(request.scope, 404, f"nothing has this {param}", errors.JobNotFound.code, param)
    reason = "no such field" if first["type"] == "extra_forbidden" else first["msg"]
    return respond(request.scope, 422, f"{escape(param)[:_MAX_PARAM]}: {reason}", errors.InvalidRequest.code, param)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """What Starlette and FastAPI raise themselves: no such route or method, an unreadable or too large body."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, errors.TandemError):
        return respond_to(error.__cause__, request.scope)
    status = error.status_code
    param = "body" if status == 400 else None
    message = f"{request.method} {escape(request.url.path)[:_MAX_PARAM]}: {error.detail}"
    return respond(request.scope, status, message, _HTTP_CODES.get(status, "http_error"), param, error.headers)
