"""An OpenAPI document as tests read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from serve.api.app import create_app
from serve.settings.tree import Settings

Json = dict[str, Any]

# Only the routes are read: no part behind them is asked.
DOCUMENT: Json = create_app(None, None, Settings(data_dir=Path("nowhere"))).openapi()  # type: ignore[arg-type]


def resolved(schema: Json) -> Json:
    while "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def validator(schema: Json) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": DOCUMENT["components"]})


def examples(content: Json) -> list[Any]:
    """Of a body: its own, or those of its schema; of a list, those of its items; of several kinds, those of each."""
    if "example" in content:
        return [content["example"]]
    if "examples" in content:
        return [each["value"] for each in content["examples"].values()]
    return own_examples(content.get("schema", {}))


def own_examples(schema: Json) -> list[Any]:
    schema = resolved(schema)
    if schema.get("type") == "array":
        return [own_examples(schema["items"])]
    found = [one for kind in schema.get("anyOf", []) for one in own_examples(kind)]
    return list(schema.get("examples", [])) or found


def parts(value: Any, schema: Json, place: str = "") -> Iterator[tuple[str, Json, Json]]:
    """Every object in an example with its schema."""
    schema = resolved(schema)
    for kind in schema.get("anyOf", []):
        if validator(kind).is_valid(value):
            yield from parts(value, kind, place)
            return
    if isinstance(value, dict) and "properties" in schema:
        yield place, value, schema
        for name, inner in value.items():
            if name in schema["properties"]:
                yield from parts(inner, schema["properties"][name], f"{place}.{name}")
    elif isinstance(value, list) and "items" in schema:
        for index, inner in enumerate(value):
            yield from parts(inner, schema["items"], f"{place}.{index}")
