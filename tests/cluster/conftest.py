from collections.abc import Iterator

import httpx
import pytest
from support.server import Server, launch, stop


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the room's tests; leases are short, so that a dead worker is noticed soon."""
    server = launch(tmp_path_factory.mktemp("tandem"), TANDEM_JOBS__LEASE_S="3")
    yield server
    stop(server)


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
