import os
import random
from collections.abc import Generator, Iterator

import pytest
import redis
from support.chaos_report import Verdict

from serve.embedded import EmbeddedRedis

SEED = int(os.environ.get("CHAOS_SEED") or random.randrange(10**6))
VERDICT = pytest.StashKey[Verdict]()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis"), "cache") as server:
        yield server


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    """An empty Redis without files."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def seed() -> int:
    """Of every random moment; printed, so that a failure can be repeated."""
    print(f"CHAOS_SEED={SEED}")
    return SEED


@pytest.fixture
def verdict(request: pytest.FixtureRequest) -> Verdict:
    """On this scenario."""
    node: pytest.Item = request.node
    return node.stash[VERDICT]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "scenario(fault, what): a row of the table in docs/reliability.md")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The row is there before anything is started: also a scenario that can't begin has failed."""
    if (marker := item.get_closest_marker("scenario")) is not None:
        item.stash[VERDICT] = Verdict(*marker.args, seed=SEED)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    verdict = item.stash.get(VERDICT, None)
    if verdict is not None:
        if report.failed:
            verdict.failed(call.excinfo.exconly() if call.excinfo else "")
            report.sections.append(("to repeat it", f"CHAOS_SEED={SEED}"))
        elif report.skipped:
            verdict.skipped()
        elif report.when == "call":
            verdict.passed()
    return report
