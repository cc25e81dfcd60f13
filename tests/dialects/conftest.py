"""Servers that draw, for the clients of each dialect."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from support.drawing import Drawing, a_redis, drawing_server

DrawingWith = Callable[..., AbstractContextManager[Drawing]]


@pytest.fixture(scope="package")
def drawing() -> Iterator[Drawing]:
    """One for all tests, with default settings and no keys."""
    with a_redis() as url, drawing_server(url) as server:
        yield server


@pytest.fixture(scope="session")
def drawing_with() -> DrawingWith:
    """Another one, with settings of its own (see `drawing_server`)."""

    @contextlib.contextmanager
    def start(**settings: Any) -> Iterator[Drawing]:
        with a_redis() as url, drawing_server(url, **settings) as server:
            yield server

    return start
