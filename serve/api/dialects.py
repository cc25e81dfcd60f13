"""What differs between the dialects that this server speaks where a request is answered before its route has it: how
an error is worded, and by the names of whose fields."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from starlette.types import Scope

from serve.errors import ClientError

_A1111 = ("/sdapi", "/internal")
_IMAGEN = ("/generate", "/status", "/outputs")
GUARDED = ("/v1", *_A1111, *_IMAGEN)
"""What asks for an API key, with all below it."""


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


def below(scope: Scope, *roots: str) -> bool:
    """Whether the request's path is one of these or below it. The mount may stand in front of the path or not: servers
    differ."""
    path: str = scope["path"]
    paths = (path, path.removeprefix(scope.get("root_path", "").rstrip("/")))
    return any(each == root or each.startswith(f"{root}/") for each in paths for root in roots)


def error_body(scope: Scope, error: ErrorDetail) -> dict[str, Any]:
    """The error as the dialect of the request's path words it; OpenAI's shape is the native one."""
    return _shape(scope)(error)


def _shape(scope: Scope) -> Callable[[ErrorDetail], dict[str, Any]]:
    if below(scope, *_A1111):
        return _a1111
    return _imagen if below(scope, *_IMAGEN) else _native


def _native(error: ErrorDetail) -> dict[str, Any]:
    return ErrorBody(error=error).model_dump()


def _a1111(error: ErrorDetail) -> dict[str, Any]:
    """As `api_middleware` of its modules/api/api.py writes them, and which field it was."""
    return {"error": error.code, "detail": error.message, "body": "", "errors": error.message, "param": error.param}


def _imagen(error: ErrorDetail) -> dict[str, Any]:
    """FastAPI's own, which that service leaves as it is."""
    return {"detail": error.message, "param": error.param}


@contextlib.contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Refusals of a native field name the dialect's instead. `names` has the dialect's by the native."""
    try:
        yield
    except ClientError as error:
        own = names.get(error.param or "")
        if own is None:
            raise
        told = error.message.removeprefix(str(error.param))
        message = error.message if told == error.message else own + told
        raise type(error)(message, own, error.retry_after_s) from error
