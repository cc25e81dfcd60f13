"""The OpenAPI document tells the truth: whatever it allows, and whatever it does not, is answered as it says."""

import json
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.generation.case import Case
from support.openapi import DOCUMENT, examples
from support.speaking import Speaking

from serve.api.document import operations

CHECKS = [
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
FEW, MANY = 1, 100
SWITCHED_OFF = ("POST /v1/benchmark", "POST /sdapi/v1/interrogate", "POST /v1/captions")
"""Answer here with a 404 only."""
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = {each.ok().label: each.ok() for each in SCHEMA.get_all_operations()}


def raw(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("latin-1", "replace")


def check(case: Case, speaking: Speaking) -> None:
    sent = requests.Request(**case.as_transport_kwargs(base_url="http://test")).prepare()
    # A header goes out as it is: httpx would take ASCII alone.
    headers = [(name.encode("latin-1"), raw(value)) for name, value in sent.headers.items()]
    body = sent.body.encode() if isinstance(sent.body, str) else sent.body
    answer = speaking.send(sent.method, sent.url, headers=headers, content=body)
    told = f"{sent.method} {sent.url} {sent.body!r:.500}: {answer.status_code} {answer.text[:500]}"
    known = case.operation.definition.raw["responses"]
    assert str(answer.status_code) in known, told
    assert answer.status_code < 500, told
    case.validate_response(answer, checks=CHECKS)
    assert answer.headers["x-request-id"]


def hold(label: str, speaking: Speaking, examples: int) -> None:
    operation = OPERATIONS[label]
    varies = operation.body or list(operation.iter_parameters())  # else there is nothing to get wrong
    for mode in schemathesis.GenerationMode if varies else [schemathesis.GenerationMode.POSITIVE]:

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            derandomize=examples == FEW,
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def each(case: Case) -> None:
            check(case, speaking)

        each()


@pytest.mark.parametrize("label", OPERATIONS)
def test_a_route_answers_as_the_document_says(label: str, speaking: Speaking) -> None:
    hold(label, speaking, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("label", OPERATIONS)
def test_a_route_answers_as_the_document_says_at_length(label: str, speaking: Speaking) -> None:
    hold(label, speaking, MANY)


def test_every_route_is_asked() -> None:
    assert len(OPERATIONS) == len(list(operations(DOCUMENT)))


ORDERS = [
    (label, kind, example)
    for label, operation in OPERATIONS.items()
    if label.startswith("POST") and label not in SWITCHED_OFF
    for kind, content in operation.definition.raw.get("requestBody", {}).get("content", {}).items()
    for example in examples(content)
    if kind == "application/json" and "..." not in json.dumps(example)
]


@pytest.mark.parametrize(("label", "kind", "example"), ORDERS, ids=[label for label, _, _ in ORDERS])
def test_what_the_document_shows_is_taken(label: str, kind: str, example: Any, speaking: Speaking) -> None:
    answer = speaking.send(
        "POST", label.removeprefix("POST "), content=json.dumps(example), headers={"content-type": kind}
    )
    assert answer.is_success, answer.text
