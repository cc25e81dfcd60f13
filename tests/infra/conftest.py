"""Real servers for the tests of this folder: one Redis for the session, flushed for every test, and moto's S3."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from moto.server import ThreadedMotoServer

from serve.embedded import EmbeddedRedis


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    # The kind without files: a test's speed must not depend on the disk's fsync.
    with EmbeddedRedis(tmp_path_factory.mktemp("redis"), "cache") as server:
        yield server


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    """An empty Redis."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def jobs_redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A durable Redis of the test's own, which it may kill and restart."""
    with EmbeddedRedis(tmp_path, "jobs") as server:
        yield server


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of an S3 server without buckets."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
