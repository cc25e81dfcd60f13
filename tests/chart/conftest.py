"""Helm renders each file of helm/tandem/ci once for all tests."""

import pytest
from support.chart import CI, Rendered, render


@pytest.fixture(params=CI, ids=lambda file: file.name.removesuffix("-values.yaml"))
def release(request: pytest.FixtureRequest) -> Rendered:
    return render(request.param)
