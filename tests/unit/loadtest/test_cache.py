"""Hit rates by sign and tier, and the least number of forwards: by hand, and by the product's own counters."""

import asyncio
import io
import json
from dataclasses import replace

import pytest
from prometheus_client import generate_latest
from rich.console import Console
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from support.listening import listening

from loadtest.bench.cache import UNIQUE, Plan, Report, Traffic, kinds, least_rows, orders, shipped_planner
from loadtest.bench.cache_meter import ROWS, UNITS, Counts, Meter
from loadtest.bench.cache_paired import OFF, Paired, PairedPlan, Round, Side, requests, side
from loadtest.bench.cache_report import any_failed, as_json, headline, tables
from loadtest.samples import Arrival, Outcome, Sample
from loadtest.servers import Budget
from loadtest.tail import Tail
from serve.bench.machine import this_machine
from serve.bench.stats import Percentiles
from serve.domain.text import Tier
from serve.errors import OperatorError
from serve.prompts.plan import Planner
from serve.settings.stores import CacheSettings
from serve.telemetry.metrics import InProcessMetrics

PAIRED = PairedPlan(encoder="t5-small", rounds=2, seconds=5.0, threads=1, seed=4)


class Server:
    """A page of the product's own metrics, and a cache that forgets when it is told to, one look later."""

    def __init__(self) -> None:
        self.metrics = InProcessMetrics()
        self.looks = 0
        self.entries = [5, 0]
        routes = [
            Route("/metrics", self.page),
            Route("/readyz", self.ready),
            Route("/v1/cache", self.cache),
            Route("/v1/cache", self.clear, methods=["DELETE"]),
        ]
        self.app = Starlette(routes=routes)
        self.cleared = False
        self.late: list[tuple[str, float, dict[str, str]]] = []

    async def page(self, request: Request) -> Response:
        self.looks += 1
        if self.late and self.looks > 2:
            name, amount, labels = self.late.pop(0)
            self.metrics.inc(name, amount, **labels)
        return PlainTextResponse(generate_latest(self.metrics.registry))

    async def ready(self, request: Request) -> Response:
        self.looks += 1
        return PlainTextResponse("", 200 if self.looks > 2 else 503)

    async def cache(self, request: Request) -> Response:
        told = {"redis": None, "processes": [{"entries": number} for number in self.entries]}
        if self.cleared:
            self.entries = [0 for _ in self.entries]
        return JSONResponse(told)

    async def clear(self, request: Request) -> Response:
        self.cleared = True
        return JSONResponse({"removed": 3})


def test_hit_rates_leave_a_sign_to_itself() -> None:
    units = {
        ("encoded", "positive"): 6,
        ("memory", "positive"): 3,
        ("redis", "positive"): 1,
        ("encoded", "negative"): 1,
        ("memory", "negative"): 3,
        ("memory", "empty"): 6,
    }
    counts = Counts(rows=6, units=units)
    assert counts.hit_rate("positive") == pytest.approx(0.4)
    assert counts.rate(Tier.REDIS, "positive") == pytest.approx(0.1)
    assert counts.hit_rate("negative") == pytest.approx(0.75)
    assert counts.hit_rate("empty") == 1.0
    assert counts.hit_rate() == pytest.approx(13 / 20)
    assert Counts().hit_rate("positive") is None


def test_counts_are_what_came_since() -> None:
    before = Counts(rows=10, units={("memory", "empty"): 4, ("encoded", "positive"): 1})
    after = Counts(rows=13, units={("memory", "empty"): 9, ("encoded", "positive"): 1, ("encoded", "negative"): 2})
    assert after.since(before) == Counts(rows=3, units={("memory", "empty"): 5, ("encoded", "negative"): 2})


def test_the_meter_waits_for_counters_that_are_told_late() -> None:
    server = Server()
    server.metrics.inc(ROWS, 4, encoder="clip")
    server.metrics.inc(UNITS, 4, encoder="clip", tier="encoded", sign="positive")
    server.late = [
        (UNITS, 3, {"encoder": "clip", "tier": "memory", "sign": "empty"}),
        (UNITS, 2, {"encoder": "other", "tier": "memory", "sign": "empty"}),
        (ROWS, 5, {"encoder": "other"}),
    ]

    async def measured() -> tuple[Counts, Counts]:
        async with listening(server.app) as port:
            url = f"http://127.0.0.1:{port}"
            async with Meter(url, f"{url}/metrics", linger_s=0.6, poll_s=0.02) as meter:
                before = await meter.counts()
                return before, await meter.settled(before, units=5)

    before, after = asyncio.run(measured())
    assert after.since(before) == Counts(rows=5, units={("memory", "empty"): 5})


def test_a_server_that_never_tells_is_no_figure() -> None:
    async def measured() -> None:
        async with listening(Server().app) as port:
            url = f"http://127.0.0.1:{port}"
            async with Meter(url, f"{url}/metrics", linger_s=0.05, patience_s=0.1, poll_s=0.02) as meter:
                await meter.settled(units=5)

    with pytest.raises(OperatorError, match="has told of 0 text units, not of 5"):
        asyncio.run(measured())


def test_an_empty_cache_is_one_that_every_process_has_emptied() -> None:
    server = Server()

    async def emptied() -> None:
        async with listening(server.app) as port, Meter(f"http://127.0.0.1:{port}", poll_s=0.02) as meter:
            await meter.empty()

    asyncio.run(emptied())
    assert server.cleared
    assert server.entries == [0, 0]


def test_a_server_that_replaces_a_part_of_itself_is_waited_for() -> None:
    server = Server()

    async def waited() -> None:
        async with listening(server.app) as port, Meter(f"http://127.0.0.1:{port}", poll_s=0.02) as meter:
            await meter.ready()

    asyncio.run(waited())
    assert server.looks == 3


@pytest.fixture(scope="module")
def planner() -> Planner:
    return shipped_planner()


def order(prompt: str, negative: str = "") -> Arrival:
    return Arrival(index=0, due_s=0.0, dialect="wait", body={"prompt": prompt, "negative_prompt": negative})


def test_the_least_is_the_number_of_different_rows(planner: Planner) -> None:
    assert least_rows(planner, [order("a red circle"), order("a red circle")]) == 2  # the prompt's and the empty one
    assert least_rows(planner, [order("a red circle"), order("A  (red:1.4) circle")]) == 2  # no other row
    assert least_rows(planner, [order("a red circle", "a blue square"), order("a blue square", "a red circle")]) == 2
    assert least_rows(planner, [order("a red circle"), order("a red square")]) == 3


def test_the_more_texts_repeat_the_fewer_forwards_a_job_needs(planner: Planner) -> None:
    least = {name: least_rows(planner, orders(prompts, 300, seed=1)) for name, prompts in kinds().items()}
    assert least["Zipf 1"] < least["Zipf 0.8"] < least["Zipf 0.6"] < least[UNIQUE]
    drawn = orders(kinds()[UNIQUE], 300, seed=1)
    assert len({one.body["prompt"] for one in drawn}) == 300
    empty = sum(not one.body["negative_prompt"] for one in drawn)
    assert 60 < empty < 120
    assert least[UNIQUE] <= 300 + (300 - empty) + 1


def answered(index: int, latency_s: float, **cache: int) -> Sample:
    tiers = {"memory": 0, "redis": 0, "encoded": 0} | cache
    return Sample(
        index=index,
        dialect="embeddings",
        due_s=10.0,
        sent_s=10.5,
        ended_s=10.0 + latency_s,
        outcome=Outcome.DONE,
        status=200,
        job={"cache": tiers},
    )


def test_a_side_tells_hits_from_what_had_to_wait() -> None:
    late = replace(answered(3, 9.0), outcome=Outcome.LATE, detail="given up", job=None)
    samples = [answered(0, 0.1, memory=2), answered(1, 2.0, encoded=1, memory=1), answered(2, 0.3, redis=2), late]
    found = side(samples)
    assert found.hits == pytest.approx(5 / 6)
    assert (found.seconds.count, found.seconds.p50) == (4, pytest.approx(1.15))  # of 0.1, 0.3, 2.0 and for ever
    assert found.seconds.p95 is None
    assert found.hit_seconds == Percentiles.of([samples[0].latency_s, samples[2].latency_s])
    assert found.failed == {"late: given up": 1}
    assert side([late]).seconds.p50 is None


def test_both_sides_of_a_round_get_the_same_and_each_round_another_trace() -> None:
    dues = [0.1 * number for number in range(50)]
    assert requests(PAIRED, dues, "round 1") == requests(PAIRED, dues, "round 1")
    texts = [one.body["prompt"] for one in requests(PAIRED, dues, "round 1")]
    assert texts != [one.body["prompt"] for one in requests(PAIRED, dues, "round 2")]
    assert len(set(texts)) < 50


def test_off_is_off_in_the_settings() -> None:
    assert CacheSettings.model_validate(OFF["cache"]).memory_bytes == 0


def one_round(cached: float, plain: float, failed: int = 0) -> Round:
    def of(seconds: float, hits: float, bad: int = 0) -> Side:
        tail = Tail(count=2, p50=seconds, p95=None if bad else seconds, p99=None, worst=None)
        each = Percentiles.of([seconds, seconds])
        return Side(seconds=tail, hit_seconds=each, hits=hits, failed={"failed: 500": bad} if bad else {})

    return Round(requests=2, texts=1, cached=of(cached, 0.5, failed), plain=of(plain, 0.0))


def test_the_report_tells_ratios_by_round_and_what_failed() -> None:
    counts = Counts(rows=3, units={("encoded", "positive"): 2, ("memory", "empty"): 2})
    traffic = Traffic(
        name="Zipf 1", orders=2, done=2, counts=counts, told={"encoded": 2, "memory": 2}, least=3, failed={}
    )
    rounds = tuple(one_round(cached, 1.0) for cached in (0.1, 0.3, 0.2))
    paired = Paired(encoders=("clip-l", "t5-small"), capacity=2.0, rate=1.6, rounds=rounds)
    plan = Plan(
        sections=frozenset({"traffic", "t5"}),
        orders=2,
        users=1,
        seed=0,
        budget=Budget(cores=(0,), torch_threads=1),
        paired=PAIRED,
    )
    made = Report(machine=this_machine(), plan=plan, traffic=(traffic,), paired=paired)
    told = json.loads(json.dumps(as_json(made)))
    assert told["traffic"][0]["rows_per_job"] == 1.5
    assert told["traffic"][0]["hit_rates"] == {"positive": 0.0, "negative": None, "empty": 1.0, "all": 0.5}
    assert told["paired"]["p50_ratio"] == {"median": 0.2, "low": 0.1, "high": 0.3, "count": 3}
    console = Console(record=True, width=140, file=io.StringIO())
    for table in tables(made):
        console.print(table)
    assert "0.200 (0.100-0.300)" in console.export_text()
    assert "seed 0" in headline(made)
    assert not any_failed(made)
    failed = replace(paired, rounds=(one_round(0.1, 1.0, failed=1),))
    assert any_failed(replace(made, paired=failed))
    assert failed.ratio("p50") is not None
    assert (failed.ratio("p95"), failed.seconds("cached", "p95")) == (None, None)
    assert json.loads(json.dumps(as_json(replace(made, paired=failed))))["paired"]["p95_ratio"] is None
    assert any(
        "never" in list(column.cells) for table in tables(replace(made, paired=failed)) for column in table.columns
    )


def test_a_server_that_does_not_answer_is_one_line() -> None:
    async def asked(path: str) -> None:
        app = Starlette(routes=[])
        async with listening(app) as port, Meter(f"http://127.0.0.1:{port}", patience_s=0.05, poll_s=0.02) as meter:
            await getattr(meter, path)()

    with pytest.raises(OperatorError, match="DELETE /v1/cache of http://127"):
        asyncio.run(asked("empty"))
    with pytest.raises(OperatorError, match="is not ready for 0 s: 404"):
        asyncio.run(asked("ready"))

    async def gone() -> None:
        async with Meter("http://127.0.0.1:1", patience_s=0.05, poll_s=0.02) as meter:
            await meter.ready()

    with pytest.raises(OperatorError, match="the server is not ready for 0 s: "):
        asyncio.run(gone())
