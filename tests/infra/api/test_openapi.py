"""The OpenAPI document is complete: each route of each dialect has examples that are true, and all its errors."""

import json
from collections.abc import Iterator

import pytest
from jsonschema import Draft202012Validator
from support.openapi import DOCUMENT, Json, examples, parts, resolved, validator

SHAPES = {"/sdapi": "A1111Error", "/internal": "A1111Error"} | dict.fromkeys(
    ("/generate", "/status", "/outputs"), "ImagenError"
)
OPEN = ("/healthz", "/readyz")
SPARSE = ("Status", "ImagesAnswer")
"""Leave out what says nothing."""
NOT_JSON = ("image/", "application/octet-stream")


def routes(document: Json) -> Iterator[tuple[str, Json]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


ROUTES = dict(routes(DOCUMENT))
each_route = pytest.mark.parametrize("route", ROUTES)


def bodies(operation: Json, errors: bool) -> Iterator[tuple[str, str, Json]]:
    for status, response in operation["responses"].items():
        if (status == "default" or status[0] in "45") == errors:
            for kind, content in response.get("content", {}).items():
                yield status, kind, content


@each_route
def test_a_route_says_what_it_does(route: str) -> None:
    operation = ROUTES[route]
    assert operation["description"].endswith(".")
    assert [each["operationId"] for each in ROUTES.values()].count(operation["operationId"]) == 1
    for each in operation.get("parameters", []):
        assert each.get("description") or each["in"] == "path", each["name"]


@each_route
def test_a_request_has_an_example_that_its_schema_allows(route: str) -> None:
    for kind, content in ROUTES[route].get("requestBody", {}).get("content", {}).items():
        found = examples(content)
        assert found, kind
        for example in found:
            assert example, kind
            validator(content["schema"]).validate(example)
            if kind == "application/json":
                known = resolved(content["schema"]).get("properties", example)
                assert set(example) <= set(known), "an example of fields that there are not"


@each_route
def test_an_answer_has_an_example_with_all_its_fields(route: str) -> None:
    for status, kind, content in bodies(ROUTES[route], errors=False):
        if kind.startswith(NOT_JSON):
            continue
        found = examples(content)
        assert found, f"{status} {kind}"
        if kind != "application/json":
            continue
        whole = resolved(content["schema"]).get("title") not in SPARSE
        for example in found:
            validator(content["schema"]).validate(example)
            for place, value, schema in parts(example, content["schema"]):
                known = set(schema["properties"])
                assert set(value) == known if whole else set(value) <= known, place


@each_route
def test_a_route_tells_its_errors_in_the_shape_of_its_dialect(route: str) -> None:
    operation, path = ROUTES[route], route.partition(" ")[2]
    expected = {"500"} if path in OPEN else {"401", "403", "500", "503"}
    expected |= {"400", "413", "415", "422"} if "requestBody" in operation else set()
    expected |= {"404"} if "{" in path and "put" not in route.lower() else set()
    assert expected <= set(operation["responses"])
    shape = next((name for root, name in SHAPES.items() if path.startswith(root)), "ErrorBody")
    for status, kind, content in bodies(operation, errors=True):
        if path == "/readyz" and status == "503":
            continue
        assert (kind, content["schema"]["$ref"].rpartition("/")[2]) == ("application/json", shape), status
        validator(content["schema"]).validate(content["example"])
    for status in {"429", "503"} & set(operation["responses"]):
        assert path in OPEN or "Retry-After" in operation["responses"][status]["headers"]


def test_no_schema_has_the_name_of_a_module() -> None:
    """FastAPI names two classes of the same name by their modules."""
    assert not [name for name in DOCUMENT["components"]["schemas"] if "__" in name]


def test_nothing_of_the_document_leads_nowhere() -> None:
    text = json.dumps(DOCUMENT)
    for name in DOCUMENT["components"]["schemas"]:
        assert f'"#/components/schemas/{name}"' in text, f"nobody uses {name}"
    for schema in DOCUMENT["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
