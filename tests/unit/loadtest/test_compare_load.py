"""Loads on a server whose speed is known: the figures must be that speed, not the client's or the orders'."""

import asyncio
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from json import loads
from pathlib import Path

import psutil
import pytest

from loadtest.bench.compare import Orders
from loadtest.bench.compare_load import offer, saturate
from loadtest.bench.compare_work import mean_weight, weight
from loadtest.servers import Serving

SPEED = 20.0
"""Mean orders a second."""
QUEUE = 40


class OneAtATime(BaseHTTPRequestHandler):
    """Speaks the baselines' dialect; an order takes its work, and a queue that is full refuses."""

    protocol_version = "HTTP/1.1"
    unit = 1.0
    turn = threading.Lock()
    waiting = 0
    broken = frozenset[int]()
    """Seeds of the orders that it can't draw."""

    def do_POST(self) -> None:
        order = loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = type(self)
        if order["seed"] in kind.broken:
            self._answer(500, b"{}", "application/json")
            return
        if kind.waiting >= QUEUE:
            self._answer(503, b"{}", "application/json")
            return
        kind.waiting += 1
        with self.turn:
            time.sleep(weight(order) / kind.unit / SPEED)
        kind.waiting -= 1
        self._answer(200, b"a picture", "image/png")

    def do_GET(self) -> None:
        self._answer(200, b"{}", "application/json")

    def _answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def orders() -> Orders:
    return Orders.of(seed=5)


@pytest.fixture
def server(orders: Orders, tmp_path: Path) -> Iterator[Serving]:
    OneAtATime.unit, OneAtATime.waiting, OneAtATime.broken = orders.unit, 0, frozenset()
    with ThreadingHTTPServer(("127.0.0.1", 0), OneAtATime) as http:
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_address[1]}"
        yield Serving(
            name="known", url=url, dialect="generate", root=psutil.Process(), data_dir=tmp_path, metrics_url=None
        )
        http.shutdown()


def test_orders_are_the_same_for_a_seed_and_others_in_each_round(orders: Orders) -> None:
    assert orders.take(1, 30) == Orders.of(seed=5).take(1, 30)
    assert orders.take(1, 30) != orders.take(2, 30)
    assert {order["seed"] for order in orders.take(1, 30)}.isdisjoint(order["seed"] for order in orders.take(2, 30))
    assert orders.unit == pytest.approx(mean_weight(orders.saturating))


def test_a_part_that_is_counted_comes_after_one_that_settles(orders: Orders) -> None:
    parts = orders.parts(1, [2.0, 6.0], 5.0, 10.0)
    assert [(part.rate, len(part.orders), part.counted) for part in parts] == [
        (2.0, 10, False),
        (2.0, 20, True),
        (6.0, 30, False),
        (6.0, 60, True),
    ]


@pytest.mark.slow
def test_a_saturated_server_shows_its_own_speed(server: Serving, orders: Orders) -> None:
    found = asyncio.run(saturate(server, orders.saturating[:90], orders.unit, users=8))
    assert found.rate.median == pytest.approx(SPEED, rel=0.15)
    assert not found.lost
    assert found.cpu_s["client"] > 0


@pytest.mark.slow
def test_an_open_loop_offers_what_it_says_and_overload_is_refused(server: Serving, orders: Orders) -> None:
    parts = orders.parts(1, [0.5 * SPEED, 4 * SPEED], 1.0, 3.0)
    half, fourfold = asyncio.run(offer(server, parts, orders.unit, seed=1, deadline_s=10.0))
    assert half.window.offered == pytest.approx(0.5 * SPEED)
    assert fourfold.window.offered == pytest.approx(4 * SPEED)
    assert half.window.refused == 0
    assert half.window.tail.p95 is not None
    assert fourfold.window.refused > 100
    assert fourfold.window.goodput == pytest.approx(SPEED, rel=0.2)
    assert fourfold.window.tail.p95 is None  # most got no picture
    assert half.window.throughput < 0.9 * SPEED < fourfold.window.goodput * 1.2


@pytest.mark.slow
def test_what_fails_while_a_queue_settles_is_a_fault_of_the_part_after_it(server: Serving, orders: Orders) -> None:
    parts = orders.parts(1, [0.2 * SPEED, 0.4 * SPEED], 1.0, 1.0)
    OneAtATime.broken = frozenset(order["seed"] for order in (parts[0].orders[0], parts[2].orders[0]))
    first, second = asyncio.run(offer(server, parts, orders.unit, seed=1, deadline_s=10.0))
    assert (first.faults, second.faults) == (1, 1)
    assert sum(first.lost.values()) == sum(second.lost.values()) == 1
    assert not first.window.lost  # it is in no figure
