from collections.abc import Iterator

import pytest
from support.captioners import one_thread


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    with one_thread():
        yield
