"""On a CUDA card, without Ray, Redis or a network: published models with random weights. `make gpu` runs them."""

from collections.abc import Iterator

import pytest
import torch

from serve.bench.gpu_memory import capped
from serve.devices import Card, card_here


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = torch.cuda.is_available()
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker("gpu")
            item.add_marker(pytest.mark.timeout(900))
            if not here:
                item.add_marker(pytest.mark.skip(reason="no CUDA card here"))


@pytest.fixture(scope="session")
def card() -> Card:
    found = card_here("cuda")
    assert found is not None
    return found


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """The device, with nothing on it before and after."""
    device = torch.device("cuda")
    with capped(device, None):
        yield device
