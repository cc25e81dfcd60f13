"""The client's types say what the server's schemas say, field by field, so that neither moves without the other."""

import dataclasses
import enum
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from serve.api import (
    analysis_schemas,
    captions,
    fleet_schemas,
    job_schemas,
    model_schemas,
    prompt_schemas,
    schemas,
    text_schemas,
)
from serve.client import answers, orders, server, texts

ANSWERS = [
    (answers.Job, schemas.JobView),
    (answers.Progress, schemas.EventView),
    (server.Model, model_schemas.ModelView),
    (server.Limits, job_schemas.LimitsView),
    (server.Quote, job_schemas.QuoteView),
    (server.Placement, fleet_schemas.PlacementView),
    (texts.Analysis, analysis_schemas.AnalysisReport),
    (texts.Encoded, text_schemas.EmbeddingReport),
    (texts.Caption, captions.CaptionView),
]
"""And what their fields hold, all the way down."""
OWN = {"raw"}
ORDERS: list[tuple[Any, type[BaseModel], set[str]]] = [
    (orders.Order, schemas.JobOrder, set()),
    (orders.AnalysisOptions, analysis_schemas.AnalysisOrder, {"prompt"}),
    (orders.EmbeddingOptions, text_schemas.EmbeddingOrder, {"prompt", "output"}),
    (orders.CaptionOptions, captions.CaptionOrder, {"image"}),
    (orders.Piece, prompt_schemas.Piece, set()),
    (orders.Entry, prompt_schemas.Entry, set()),
]


def fields(kind: Any) -> dict[str, Any]:
    """Type by name."""
    hints = typing.get_type_hints(kind)
    if dataclasses.is_dataclass(kind):
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return {field.alias or name: hints[name] for name, field in kind.model_fields.items()}


def records(kind: Any) -> Iterator[Any]:
    """The dataclasses and schemas that a type is made of."""
    if dataclasses.is_dataclass(kind) or (isinstance(kind, type) and issubclass(kind, BaseModel)):
        yield kind
    for part in typing.get_args(kind):
        yield from records(part)


def held(client: Any, api: Any) -> Iterator[tuple[Any, Any]]:
    """These two, and what stands in the same place of both."""
    yield client, api
    known, told = fields(client), fields(api)
    for name in known.keys() & told.keys():
        for pair in zip(records(known[name]), records(told[name]), strict=True) if name != "request" else ():
            yield from held(*pair)


@pytest.mark.parametrize(("client", "api"), ANSWERS, ids=lambda kind: kind.__name__)
def test_answers(client: Any, api: Any) -> None:
    for known, told in held(client, api):
        assert fields(known).keys() - OWN == fields(told).keys(), (known, told)


@pytest.mark.parametrize(("client", "api", "apart"), ORDERS, ids=lambda kind: getattr(kind, "__name__", ""))
def test_orders(client: Any, api: type[BaseModel], apart: set[str]) -> None:
    assert client.__annotations__.keys() | apart == fields(api).keys()


def test_choices_are_those_of_the_server() -> None:
    known, told = typing.get_type_hints(orders.Order), typing.get_type_hints(schemas.JobOrder)
    met = 0
    for name, hint in told.items():
        for kind in (hint, *typing.get_args(hint)):
            if isinstance(kind, enum.EnumType):
                met += 1
                assert set(typing.get_args(typing.get_args(known[name])[0])) == {str(each) for each in kind}, name
    assert met >= 5
