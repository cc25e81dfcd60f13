"""An order's trace: from the ingress, by way of the job store, to the replica, at a collector."""

import asyncio
import itertools
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.collector import Collector, Span
from support.house import House

from serve.diffusion.runner import Runner
from serve.diffusion.scheduler import Row
from serve.domain.jobs import JobState
from serve.errors import GenerationFailed
from serve.settings.telemetry import TracingSettings
from serve.stages import stages
from serve.telemetry.tracing import Tracing, open_tracing

from .conftest import Stand, StandOn

pytestmark = pytest.mark.anyio

ORDER = {"prompt": "a secret red circle", "width": 64, "height": 64, "num_inference_steps": 3}
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture
async def house(redis_url: str, tmp_path: Path) -> AsyncIterator[House]:
    house = House(redis_url, tmp_path)
    yield house
    await house.close()


class Stumbling(Runner):
    """Its first step fails."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.family)
        self.stumbled = False

    def step(self, rows: Sequence[Row], most: int | None = None) -> dict[Row, Exception]:
        if not self.stumbled:
            self.stumbled = True
            raise GenerationFailed("a step went wrong")
        return super().step(rows, most)


def traced(url: str, **settings: Any) -> TracingSettings:
    return TracingSettings(endpoint=url, **settings)


async def a_job(stand: Stand, house: House, tracing: Tracing | None, headers: dict[str, str] | None = None) -> str:
    """A job that was ordered over HTTP and drawn; its spans have been sent."""
    async with house.worker(tracing=tracing):
        answer = await stand.client.post("/v1/jobs", json=ORDER, headers=headers or {})
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        await house.ended(job_id)
    if tracing is not None:
        await tracing.close()
    return job_id


def one(spans: list[Span], name: str) -> Span:
    (found,) = (span for span in spans if span.name == name)
    return found


async def test_one_trace_shows_ingress_and_replica(
    redis_url: str, tmp_path: Path, stand_on: StandOn, house: House, collector: Collector
) -> None:
    settings = traced(collector.url, headers="api-key=a%20key")
    async with stand_on(redis_url, tmp_path, tracing=settings) as stand:
        tracing = open_tracing(settings, "diffusion", "replica")
        job_id = await a_job(stand, house, tracing, {"traceparent": f"00-{TRACE}-{CALLER}-01"})
    job = await house.jobs.get(job_id)
    assert job.state is JobState.SUCCEEDED
    assert collector.headers["api-key"] == "a key"
    spans = collector.trace_of(job_id)
    assert {span.trace for span in spans} == {TRACE}
    order, drawn = one(spans, "POST /v1/jobs"), one(spans, "job")
    assert (order.service, order.parent) == ("tandem-ingress", CALLER)
    assert (drawn.service, drawn.parent) == ("tandem-diffusion", order.id)
    assert order.attributes["http.response.status_code"] == 202
    assert drawn.attributes["tandem.outcome"] == "succeeded"
    assert drawn.attributes["tandem.steps"] == 3
    assert drawn.attributes["tandem.batch_images"] == 1
    assert drawn.attributes["tandem.tier"] == "encoded"
    told = [(name, took) for name, took in stages(job.timings) if name not in ("admission", "told")]
    below = sorted((span for span in spans if span.parent == drawn.id), key=lambda span: span.start_s)
    assert {span.name for span in below} == {name for name, _ in told}
    for name, took in told:
        assert one(below, name).took_s == pytest.approx(took, abs=1e-5), name
    assert sum(span.took_s for span in below) <= drawn.took_s
    for before, after in itertools.pairwise(below):
        assert after.start_s >= before.end_s - 1e-5, "they follow one another"
    assert below[0].start_s == pytest.approx(drawn.start_s, abs=1e-5)
    assert not any("secret" in str(value) for span in spans for value in span.attributes.values())
    assert not any(span.failed for span in spans)


async def test_without_a_traceparent_a_trace_begins_and_one_that_is_not_sampled_is_not_told(
    redis_url: str, tmp_path: Path, stand_on: StandOn, house: House, collector: Collector
) -> None:
    async with stand_on(redis_url, tmp_path, tracing=traced(collector.url)) as stand:
        tracing = open_tracing(traced(collector.url), "diffusion", "replica")
        silent = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
        assert (await stand.client.post("/v1/jobs", json=ORDER, headers=silent)).status_code == 202
        job_id = await a_job(stand, house, tracing, {"traceparent": "nonsense"})
    assert {span.name for span in collector.trace_of(job_id)} >= {"POST /v1/jobs", "job", "steps"}
    assert TRACE not in {span.trace for span in collector.spans}
    assert one(collector.trace_of(job_id), "POST /v1/jobs").parent == ""


async def test_of_no_orders_none_is_told(
    redis_url: str, tmp_path: Path, stand_on: StandOn, house: House, collector: Collector
) -> None:
    settings = traced(collector.url, sample_ratio=0.0)
    async with stand_on(redis_url, tmp_path, tracing=settings) as stand:
        await a_job(stand, house, open_tracing(settings, "diffusion", "replica"))
    assert collector.spans == []


async def test_a_failed_attempt_and_its_successor_are_of_one_trace(
    redis_url: str, tmp_path: Path, stand_on: StandOn, house: House, collector: Collector
) -> None:
    async with stand_on(redis_url, tmp_path, tracing=traced(collector.url)) as stand:
        tracing = Tracing(traced(collector.url), "diffusion", "replica")
        answer = await stand.client.post("/v1/jobs", json=ORDER)
        job_id = answer.json()["id"]
        async with house.worker(runner=Stumbling(house.runner), tracing=tracing):
            await house.ended(job_id)
        await tracing.close()
    assert ((await house.jobs.get(job_id)).timings.retried_s or 0) > 0
    attempts = sorted(
        (span for span in collector.trace_of(job_id) if span.name == "job"), key=lambda span: span.start_s
    )
    assert [span.attributes["tandem.outcome"] for span in attempts] == ["retried", "succeeded"]
    assert [span.attributes["tandem.attempt"] for span in attempts] == [1, 2]
    assert [span.failed for span in attempts] == [True, False]
    assert len({span.parent for span in attempts}) == 1
    assert attempts[1].start_s >= attempts[0].end_s - 0.05, "the second begins where it joined the queue again"


async def test_a_collector_that_is_away_costs_spans_and_one_warning(
    redis_url: str,
    tmp_path: Path,
    stand_on: StandOn,
    house: House,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve.telemetry.tracing.CLOSE_S", 0.3)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        settings = traced(f"http://127.0.0.1:{nobody.getsockname()[1]}/v1/traces")
        with caplog.at_level(logging.INFO):
            async with stand_on(redis_url, tmp_path, tracing=settings) as stand:
                job_id = await a_job(stand, house, open_tracing(settings, "diffusion", "replica"))
    assert (await house.jobs.get(job_id)).state is JobState.SUCCEEDED
    told = [record for record in caplog.records if "tracing.endpoint" in record.getMessage()]
    assert 1 <= len(told) <= 2, "one of each process"
    assert all(record.levelname == "WARNING" and "127.0.0.1" in record.getMessage() for record in told)
    assert all("refused" in record.getMessage() for record in told)
    assert not logging.getLogger("opentelemetry.exporter").propagate, "what the library says of each batch is kept back"


async def test_a_collector_that_refuses_is_told_once_and_when_it_takes_spans_again(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.status = 401
    tracing = Tracing(traced(collector.url), "ingress", "a test")
    flush = tracing._provider.force_flush
    with caplog.at_level(logging.INFO):
        for status in (401, 401, 200, 401):
            collector.status = status
            tracing.order(None).end("POST /v1/jobs", {}, failed=False)
            flush()
        await tracing.close()
    told = [record.levelname for record in caplog.records if "tracing.endpoint" in record.getMessage()]
    assert told == ["WARNING", "INFO", "WARNING"]
    assert "401" in caplog.text
    assert len(collector.spans) == 1


async def test_a_secret_that_a_collector_repeats_is_not_told(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.status, collector.reason = 401, "hunter2 is no key of ours"
    tracing = Tracing(traced(collector.url, headers="api-key=hunter2"), "ingress", "a test")
    tracing.order(None).end("POST /v1/jobs", {}, failed=False)
    await asyncio.to_thread(tracing._provider.force_flush)
    await tracing.close()
    assert collector.headers["api-key"] == "hunter2"
    told = [record.getMessage() for record in caplog.records if record.name == "serve.telemetry.tracing"]
    assert len(told) == 1
    assert told[0].endswith("reason: ********** is no key of ours")


def test_what_is_off_is_not_even_imported() -> None:
    told = (
        "import sys, serve.telemetry.tracing as t, serve.settings.telemetry as s\n"
        "assert t.open_tracing(s.TracingSettings(), 'ingress', 'a test') is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", told], check=True)
