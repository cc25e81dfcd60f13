"""The OpenAPI document: what FastAPI makes of the routes, with an example of all that is sent and answered, and with
the errors that any route of its kind may answer, each in the shape of its dialect.

Routes list the errors that are theirs (`serve.api.errors.documented`). What stands here is everybody's: no key, a body
that can't be read, a part that is away.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from serve.api.dialects import GUARDED, below, error_body
from serve.api.errors import detail

EXAMPLES = Path(__file__).with_name("examples.json")
"""`schemas`: by the name of a schema, what it may look like; `operations`: by operation, the rest."""

Json = dict[str, Any]

_REFERENCE = re.compile(r'"#/components/schemas/([^"]+)"')
_EVERYWHERE = (500,)
_GUARDED = (401, 403, 503)
_WITH_BODY = (400, 413, 415, 422)
_QUERIED = "/v1"
"""Below it an unknown query parameter is refused."""
_OF_ITS_OWN = ("readyz",)
"""Operations whose errors say more than an error does."""
_SHAPES: Mapping[str, str] = {
    "/sdapi": "A1111Error",
    "/internal": "A1111Error",
    "/generate": "ImagenError",
    "/status": "ImagenError",
    "/outputs": "ImagenError",
}
"""The schema of errors below a path; everywhere else `ErrorBody`."""
_HEADERS: Mapping[int, Json] = {
    401: {"WWW-Authenticate": ("How a key is sent: `Bearer`.", "string")},
    429: {"Retry-After": ("Seconds after which to try again.", "integer")},
    503: {"Retry-After": ("Seconds after which to try again.", "integer")},
}
_SAID: Mapping[int, tuple[str, str, str | None]] = {
    400: ("the body is not JSON: Expecting value", "invalid_json", "body"),
    401: ("this server wants an API key: Authorization: Bearer <key>", "unauthorized", None),
    403: ("the API key lacks the scope generate", "forbidden", None),
    404: ("there is no such job, or its record's time is over", "not_found", "id"),
    405: ("PUT /v1/models: Method Not Allowed", "method_not_allowed", None),
    409: ("job 6f1b0c52a4e94d1f9d0c1a2b3c4d5e6f was cancelled", "cancelled", None),
    410: ("this order was served, and its record's time is over", "gone", "Idempotency-Key"),
    413: ("the body is over 33554432 bytes", "payload_too_large", "body"),
    415: ("send JSON, with Content-Type: application/json", "unsupported_media_type", "body"),
    422: ("prompt is empty", "invalid_value", "prompt"),
    429: ("60 requests a minute is your allowance", "rate_limited", None),
    500: ("internal error; the server's log has the details", "internal_error", None),
    501: ("this server has no model that describes pictures", "not_offered", None),
    503: ("the queue is full: 1000 jobs wait", "queue_full", None),
    504: ("not done within 300 s; it goes on, and GET /v1/jobs/6f1b0c52a4e94d1f9d0c1a2b3c4d5e6f tells when it is done",
          "still_running", None),
}  # fmt: skip


def install(app: FastAPI) -> None:
    """Have the application tell its document finished, as FastAPI's manual says to extend it."""
    plain = app.openapi

    def openapi() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = finished(plain())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def finished(document: Json) -> Json:
    """The same, filled in."""
    told = json.loads(EXAMPLES.read_text(encoding="utf-8"))
    schemas = document["components"]["schemas"]
    for name, examples in told["schemas"].items():
        if name in schemas:  # else this server has no such route
            schemas[name].setdefault("examples", examples)
    for path, operation in operations(document):
        _tell_errors(path, operation, schemas)
        _fill(operation, told["operations"].get(operation["operationId"], {}))
    _drop_unused(document, schemas)
    return document


def operations(document: Json) -> Iterator[tuple[str, Json]]:
    """Path and operation of every route."""
    for path, methods in document["paths"].items():
        for operation in methods.values():
            yield path, operation


def is_error(status: str) -> bool:
    return status == "default" or status[0] in "45"


def _tell_errors(path: str, operation: Json, schemas: Json) -> None:
    """Those that the route lists, and those that every route of its kind may answer with."""
    responses = operation["responses"]
    for status in _statuses(path, operation):
        responses.setdefault(str(status), {"description": HTTPStatus(status).phrase})
    for status, response in responses.items():
        if is_error(status) and operation["operationId"] not in _OF_ITS_OWN:
            number = 500 if status == "default" else int(status)
            response["content"] = {"application/json": _error(path, number, schemas)}
            response.setdefault("headers", {}).update(_headers(number))
    operation["responses"] = dict(sorted(responses.items()))


def _statuses(path: str, operation: Json) -> Iterator[int]:
    yield from _EVERYWHERE
    if _under(path, *GUARDED):
        yield from _GUARDED
    if "requestBody" in operation:
        yield from _WITH_BODY
    elif _under(path, _QUERIED) or any(each["in"] != "path" for each in operation.get("parameters", ())):
        yield 422


def _under(path: str, *roots: str) -> bool:
    return below({"path": path, "root_path": ""}, *roots)


def _error(path: str, status: int, schemas: Json) -> Json:
    """The JSON of an error. Its schema joins the others."""
    body = error_body({"path": path, "root_path": ""}, detail(status, *_SAID.get(status, _SAID[500])))
    name = next((name for root, name in _SHAPES.items() if _under(path, root)), "ErrorBody")
    schemas.setdefault(name, _schema(name, body))
    return {"schema": {"$ref": f"#/components/schemas/{name}"}, "example": body}


def _schema(name: str, body: Json) -> Json:
    """Of a flat body whose values are text; only `param` may be null."""
    text = {"type": "string"}
    properties = {key: {"anyOf": [text, {"type": "null"}]} if key == "param" else text for key in body}
    told = "The body of every answer of this dialect that is not a success."
    return {"type": "object", "title": name, "description": told, "properties": properties, "required": list(body)}


def _drop_unused(document: Json, schemas: Json) -> None:
    """Schemas that FastAPI made for errors which are worded otherwise here."""
    while unused := set(schemas) - set(_REFERENCE.findall(json.dumps(document))):
        for name in unused:
            del schemas[name]


def _headers(status: int) -> Json:
    return {
        name: {"description": told, "schema": {"type": kind}} for name, (told, kind) in _HEADERS.get(status, {}).items()
    }


def _fill(operation: Json, told: Json) -> None:
    """Examples of a request's bodies by media type, of its parameters by name, and of its answers by status and media
    type."""
    for kind, examples in told.get("request", {}).items():
        operation["requestBody"]["content"][kind]["examples"] = examples
    for status, contents in told.get("responses", {}).items():
        for kind, example in contents.items():
            operation["responses"][status]["content"][kind]["example"] = example
