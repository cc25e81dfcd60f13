from collections.abc import Iterator

import httpx
import pytest
from support.collector import Collector
from support.server import Server, launch, stop


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """What that server tells its jobs' traces to."""
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Server]:
    """One server for the room's tests; leases are short, so that a dead worker is noticed soon."""
    folder = tmp_path_factory.mktemp("tandem")
    server = launch(folder, TANDEM_JOBS__LEASE_S="3", TANDEM_TRACING__ENDPOINT=collector.url)
    yield server
    stop(server)


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
