"""Reading metrics: a real page over real HTTP, gaps, and what counters and gauges of several pages come to."""

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from support.listening import listening
from support.load_results import STARTED_AT, key, page

from loadtest.report.scrape import NAMES, Scraper, values
from loadtest.report.series import Series, amounts
from serve.errors import OperatorError
from serve.telemetry.declarations import DECLARATIONS
from serve.telemetry.metrics import InProcessMetrics

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 -- what is waited for are pages of another task
            await asyncio.sleep(0.005)


class Page:
    """A page of a server's metrics, which fails as it is told."""

    def __init__(self) -> None:
        self.metrics = InProcessMetrics(placement="default")
        self.instead: Response | None = None
        self.app = Starlette(routes=[Route("/metrics", self.read)])

    async def read(self, request: Request) -> Response:
        return self.instead or PlainTextResponse(generate_latest(self.metrics.registry))


async def test_the_page_of_a_server_is_read_again_and_again() -> None:
    told = Page()
    told.metrics.inc("tandem_engine_steps_total", 5)
    told.metrics.observe("tandem_engine_step_rows", 4)
    async with listening(told.app) as port, Scraper(f"http://127.0.0.1:{port}/metrics", 0.01) as scraper:
        told.metrics.inc("tandem_engine_steps_total", 2)
        told.metrics.inc("tandem_text_units_total", 3, encoder="e", tier="redis", sign="negative")
        told.metrics.set("tandem_queue_age_seconds", 1.5, model="shapes")
        await until(lambda: bool(scraper.series.gauge("tandem_queue_age_seconds")))
        told.metrics.set("tandem_queue_age_seconds", 2.5, model="shapes")
        await until(lambda: scraper.series.pages[-1].values.get(key("tandem_queue_age_seconds", model="shapes")) == 2.5)
    series = scraper.series
    assert not series.gaps
    assert {name for each in series.pages for name, _ in each.values} <= NAMES
    assert series.total("tandem_engine_steps_total", 0, math.inf) == pytest.approx({(): 2.0})
    assert series.total("tandem_text_units_total", 0, math.inf, "sign", "tier") == {("negative", "redis"): 3.0}
    ages = [value for _, value in series.gauge("tandem_queue_age_seconds", "model")[("shapes",)]]
    assert ages[-1] == 2.5
    assert 1.5 in ages
    times = [each.at for each in series.pages]
    assert times == sorted(set(times))


async def test_the_page_is_read_on_entering_and_on_leaving() -> None:
    told = Page()
    async with listening(told.app) as port:
        async with Scraper(f"http://127.0.0.1:{port}/metrics", 3600.0) as scraper:
            told.metrics.inc("tandem_engine_steps_total", 7)
        assert scraper.series.total("tandem_engine_steps_total", 0, math.inf) == {(): 7.0}


async def test_a_page_that_does_not_answer_is_a_gap_that_says_why() -> None:
    told, broken = Page(), Page()
    told.metrics.inc("tandem_engine_steps_total")
    wrong = {
        "status 503": PlainTextResponse("", 503),
        "not a Prometheus page": PlainTextResponse("<html>a proxy's own page</html>"),
    }
    async with listening(told.app) as port, listening(broken.app) as other:
        pages = [f"http://127.0.0.1:{each}/metrics" for each in (port, other)]
        async with Scraper(pages, 0.01) as scraper:
            for why, answer in wrong.items():
                broken.instead = answer
                await until(lambda why=why: scraper.series.pages[-1].error == why)
            broken.instead = None
            await until(lambda: not scraper.series.pages[-1].error)
    series = scraper.series
    assert series
    assert {each.error for each in series.gaps} == set(wrong)
    assert {each.url for each in series.gaps} == {pages[1]}
    assert [each.at for each in series.pages[::2]] == [each.at for each in series.pages[1::2]]


async def test_a_server_that_is_not_there_ends_no_run(unused_url: str) -> None:
    async with Scraper(unused_url, 0.01) as scraper:
        await until(lambda: len(scraper.series.pages) > 2)
    assert not scraper.series
    assert {each.error for each in scraper.series.gaps} == {"no answer (ConnectError)"}


@pytest.fixture
def unused_url() -> Any:
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}/metrics"


async def test_a_scraper_without_a_page_reads_nothing() -> None:
    async with Scraper([], 0.01, linger_s=60.0) as scraper:
        pass
    assert scraper.series.pages == ()


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(OperatorError, match="metrics 8090: write the http:// address"):
        Scraper("8090")


def test_every_name_that_is_kept_is_a_declared_metric() -> None:
    assert {each.name for each in DECLARATIONS} >= NAMES


def test_a_page_as_ray_exports_it() -> None:
    text = """\
# HELP ray_tandem_queue_depth Jobs that wait for a worker.
# TYPE ray_tandem_queue_depth gauge
ray_tandem_queue_depth{Component="core_worker",WorkerId="0a",Version="2.60.0"} 3.0
# TYPE ray_tandem_engine_steps_total counter
ray_tandem_engine_steps_total{WorkerId="0b",gpu_class="",placement="a \\"b\\""} 12.0
# TYPE ray_tandem_engine_step_rows histogram
ray_tandem_engine_step_rows_bucket{le="1"} 12.0
# TYPE ray_node_cpu gauge
ray_node_cpu{ip="127.0.0.1"} 2.0
"""
    assert values(text) == {
        key("tandem_queue_depth", Component="core_worker", WorkerId="0a", Version="2.60.0"): 3.0,
        key("tandem_engine_steps_total", WorkerId="0b", gpu_class="", placement='a "b"'): 12.0,
    }


def test_what_two_processes_only_hear_of_is_told_once_and_what_is_their_own_adds_up() -> None:
    depth, images = "tandem_queue_depth", "tandem_replica_images"
    values = {
        key(depth, WorkerId="a"): 9.0,
        key(depth, WorkerId="b"): 5.0,
        key(images, WorkerId="a", placement="x"): 1.0,
        key(images, WorkerId="b", placement="x"): 2.0,
        key(images, WorkerId="c", placement="y"): 4.0,
    }
    series = Series((page(1.0, values), page(1.0, {key(depth, WorkerId="c"): 7.0}, url="http://b")))
    assert series.gauge(depth) == {(): [(STARTED_AT + 1, 9.0)]}
    assert series.gauge(images, "placement") == {("x",): [(STARTED_AT + 1, 3.0)], ("y",): [(STARTED_AT + 1, 4.0)]}
    wanted = {
        key("tandem_replicas_wanted", WorkerId=worker, model="m", placement=place): 2.0
        for worker in "ab"
        for place in "xy"
    }
    assert Series((page(1.0, wanted),)).gauge("tandem_replicas_wanted") == {(): [(STARTED_AT + 1, 4.0)]}


def test_a_gauge_is_not_known_where_a_page_failed_or_it_was_gone() -> None:
    images = "tandem_replica_images"
    series = Series(
        (
            page(1.0, {key(images): 1.0}),
            page(1.0, {key(images): 1.0}, url="http://b"),
            page(2.0, {key(images): 1.0}),
            page(2.0, error="status 503", url="http://b"),
            page(3.0),
            page(3.0, url="http://b"),
        )
    )
    (points,) = series.gauge(images).values()
    assert points[0] == (STARTED_AT + 1, 2.0)
    assert [math.isnan(value) for _, value in points[1:]] == [True, True]


def test_a_counter_grows_evenly_since_it_was_last_seen_to_change() -> None:
    steps = key("tandem_engine_steps_total")
    looks = [(0.0, 100.0), (2.0, 100.0), (4.0, 110.0), (6.0, 110.0), (8.0, 110.0), (10.0, 130.0)]
    series = Series(tuple(page(at, {steps: value}) for at, value in looks))
    (grown,) = series.growth(steps[0]).values()
    assert [(one.since - STARTED_AT, one.until - STARTED_AT, one.amount) for one in grown] == [
        (0.0, 4.0, 10.0),
        (2.0, 10.0, 20.0),
    ]
    edges = [STARTED_AT + edge for edge in (0, 2, 6, 10, 20)]
    assert amounts(grown, edges) == pytest.approx([5.0, 15.0, 10.0, 0.0])


def test_a_counter_that_is_new_or_began_again_has_grown_by_all_that_it_says() -> None:
    old, new = key("tandem_engine_steps_total", WorkerId="a"), key("tandem_engine_steps_total", WorkerId="b")
    series = Series((page(0.0, {old: 50.0}), page(2.0, {old: 3.0, new: 4.0}), page(4.0, {new: 6.0})))
    assert series.total("tandem_engine_steps_total", 0, math.inf) == {(): 3.0 + 4.0 + 2.0}
    later = Series((page(0.0, error="status 503"), page(2.0, {old: 50.0})))
    assert later.total("tandem_engine_steps_total", 0, math.inf) == {}


def test_a_long_silence_is_no_slow_growth() -> None:
    steps = key("tandem_engine_steps_total")
    series = Series((*(page(2.0 * n, {steps: 1.0}) for n in range(50)), page(100.0, {steps: 11.0})))
    (grown,) = series.growth(steps[0]).values()
    assert [(one.since - STARTED_AT, one.until - STARTED_AT) for one in grown] == [(88.0, 100.0)]


def test_how_often_the_counters_change_is_measured() -> None:
    steps = key("tandem_engine_steps_total")
    often = Series(tuple(page(2.0 * n, {steps: float(n // 3)}) for n in range(30)))
    assert often.refresh_s == 6.0
    assert Series().refresh_s == 10.0
