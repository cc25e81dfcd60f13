"""The body of a request about a picture: a form with files in it, as OpenAI's clients send it, or JSON."""

from __future__ import annotations

import base64
import json
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve.api.openai_orders import EditOrder
from serve.errors import ClientError, InvalidRequest, TandemError, UnsupportedMediaType

MOST_FILES, MOST_FIELDS = 32, 200
"""Of a form. OpenAI's API takes 16 pictures; that one alone is edited here is told in so many words."""
_FORM, _JSON = "multipart/form-data", "application/json"
_FILES = ("image", "mask")
_MANY = "[]"
"""How a form spells the name of a field that came several times."""


async def _order(request: Request) -> EditOrder:
    """Raises RequestValidationError, InvalidRequest, UnsupportedMediaType, and ClientError for what is no form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _JSON:
        return _checked(await _read_json(request))
    if kind != _FORM:
        raise UnsupportedMediaType(f"send {_FORM} or {_JSON}", "body")
    try:
        async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS) as form:
            return _checked(await _fields(form), strict=False)  # in a form everything is text
    except ClientDisconnect:
        raise _cut_short() from None
    except HTTPException as error:
        if isinstance(error.__cause__, TandemError):
            raise
        raise ClientError(f"the body is no form that can be read: {error.detail}", "body") from None


PictureOrder = Annotated[EditOrder, Depends(_order)]


async def _read_json(request: Request) -> Any:
    try:
        if not await request.body():
            raise InvalidRequest("the body is empty", "body")
        return await request.json()
    except ClientDisconnect:
        raise _cut_short() from None
    except json.JSONDecodeError as error:
        told = {"type": "json_invalid", "loc": ("body", error.pos), "input": {}, "ctx": {"error": error.msg}}
        raise RequestValidationError([told]) from None
    except (ValueError, RecursionError):  # bytes that are no text, brackets without end
        raise ClientError("the body is not JSON that can be read", "body") from None


def _cut_short() -> ClientError:
    """Nobody reads it."""
    return ClientError("the body is cut short", "body")


def _checked(data: Any, strict: bool | None = None) -> EditOrder:
    """`strict` None leaves it to the fields."""
    try:
        return EditOrder.model_validate(data, strict=strict)
    except ValidationError as error:
        told = error.errors(include_url=False)
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in told]) from None


async def _fields(form: FormData) -> dict[str, Any]:
    """Files as base64. Nothing is read of what no field is called."""
    read: dict[str, Any] = {}
    for name, value in form.multi_items():
        name = name.removesuffix(_MANY)
        field, _, inner = name.partition("[")
        if field not in EditOrder.model_fields:
            continue
        if inner:
            raise InvalidRequest(f"{field} has no form of its own in a form; send the request as JSON", field)
        if name in read:
            told = "one picture is edited at a time" if name in _FILES else "it is wanted once"
            raise InvalidRequest(f"{name} came several times; {told}", name)
        if not isinstance(value, str) and name not in _FILES:
            raise InvalidRequest(f"{name} must be text, not a file", name)
        read[name] = value if isinstance(value, str) else base64.b64encode(await value.read()).decode()
    return read


def documented_body() -> dict[str, Any]:
    """What the OpenAPI document says of such a body."""
    schema = EditOrder.model_json_schema()
    schema = _inlined(schema, schema.pop("$defs"))
    files = {
        name: {"type": "string", "format": "binary", "description": schema["properties"][name]["description"]}
        for name in _FILES
    }
    others = {name: each for name, each in schema["properties"].items() if name != "images"}
    form = schema | {"properties": others | files, "required": ["image"]}
    return {"requestBody": {"required": True, "content": {_FORM: {"schema": form}, _JSON: {"schema": schema}}}}


def _inlined(node: Any, known: dict[str, Any]) -> Any:
    """The same with each reference replaced by what it names: the document knows no schema that no route declares."""
    if isinstance(node, list):
        return [_inlined(each, known) for each in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(known[node["$ref"].rpartition("/")[2]], known)
    return {name: _inlined(each, known) for name, each in node.items()}
