"""Helm renders each file of helm/tandem/ci, and the values of each overlay of k8s/, once for all tests."""

from pathlib import Path

import pytest
from support.chart import CI, OVERLAYS, Rendered, render


def _name(file: Path) -> str:
    return f"k8s-{file.parent.name}" if file in OVERLAYS else file.name.removesuffix("-values.yaml")


@pytest.fixture(params=[*CI, *OVERLAYS], ids=_name)
def release(request: pytest.FixtureRequest) -> Rendered:
    return render(request.param)
