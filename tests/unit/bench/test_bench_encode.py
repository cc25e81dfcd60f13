"""The measurements themselves, on encoders so small that a run takes seconds. Figures are not judged here."""

import asyncio
import io
import json
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr
from rich.console import Console

from serve.bench.bars import bars
from serve.bench.encode import Plan, Report, measure
from serve.bench.load import Latency
from serve.bench.report import as_json, headline, tables
from serve.bench.service import Loss, ServiceLatency, ServicePlan, measure_loss, measure_service
from serve.bench.shapes import EncoderShape
from serve.bench.stats import Percentiles, Spread
from serve.bench.texts import random_row
from serve.bench.throughput import Batch, Throughput
from serve.bench.weights import encoder_of, random_encoder
from serve.domain.text import EncodeUnit
from serve.embedded import EmbeddedRedis
from serve.encoders.forward import TextTower
from serve.encoders.pool import EncoderPool
from serve.settings.pools import EncoderSettings
from serve.settings.stores import CacheSettings
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics

SIZES = {"width": 64, "layers": 2, "heads": 2, "head_width": 32, "feed_forward": 128, "vocab_size": 1300}
CLIP = EncoderShape(name="tiny-clip", kind="clip", **SIZES)
PROJECTED = EncoderShape(name="tiny-projected", kind="clip", projection=64, **SIZES)
T5 = EncoderShape(name="tiny-t5", kind="t5", row_tokens=32, **SIZES)
SECONDS = 0.2


def no_server(_: Path, __: Mapping[str, Mapping[str, object]]) -> AbstractAsyncContextManager[str]:
    raise AssertionError("this plan wants no server")


@pytest.fixture(scope="module")
def report() -> Report:
    plan = Plan(
        shapes=(CLIP, PROJECTED, T5),
        device="cpu",
        dtype="float32",
        seconds=SECONDS,
        seed=1,
        sections=frozenset({"throughput", "pool", "precision", "hits"}),
        precise=frozenset({CLIP.name, T5.name}),
        served=frozenset(),
        compiled=False,
    )
    return asyncio.run(measure(plan, no_server, lambda _: None))


def test_every_encoder_is_measured_one_by_one_and_in_batches(report: Report) -> None:
    assert [one.encoder for one in report.throughput] == [CLIP.name, PROJECTED.name, T5.name]
    for one in report.throughput:
        assert [batch.size for batch in one.batches][:2] == [1, 2]
        assert one.ratio >= 1
        assert one.ratio == one.best.rows_per_s.median / one.single
        assert one.share(one.bound) == pytest.approx(1)


def test_the_pool_answers_every_request_of_both_loads(report: Report) -> None:
    for pool in report.pools:
        assert [load.load for load in pool.loads] == [0.5, 0.9]
        for load in pool.loads:
            assert not load.failed
            assert load.rate == pytest.approx(load.load * pool.capacity)
            assert load.seconds is not None
            assert load.seconds.count == max(1, round(load.rate * SECONDS))


def test_hits_are_of_both_tiers_and_carry_the_real_bytes(report: Report) -> None:
    sizes = {(hit.tier, hit.request): hit.bytes for hit in report.hits}
    assert 77 * 768 * 2 < sizes["memory", "SD 1.5, 1 unit"] < 77 * 768 * 2 + 200
    pair = 2 * 2 * (77 * 768 + 77 * 1280 + 1280)
    assert pair < sizes["redis", "SDXL, prompt and negative, 6 units"] < pair + 1000
    assert 512 * 4096 * 2 < sizes["redis", "T5-XXL, 512 tokens, 1 unit"] < 512 * 4096 * 2 + 200


def test_precisions_are_held_against_float32(report: Report) -> None:
    measured = {(one.encoder, one.dtype, one.form): one for one in report.precisions}
    assert len(measured) == 14
    for name in (CLIP.name, T5.name):
        exact, half = measured[name, "float32", "plain"], measured[name, "bfloat16", "plain"]
        assert exact.cosine is not None
        assert half.cosine is not None
        assert exact.cosine.least == pytest.approx(1, abs=1e-12)
        assert 0.99 < half.cosine.least < exact.cosine.least
        assert exact.bytes is not None
        assert half.bytes is not None
        assert half.bytes < exact.bytes
    for one in report.stored:
        assert one.int8_bytes < one.exact_bytes
        assert one.cosine.least > 0.999


def test_a_report_is_tables_and_json(report: Report) -> None:
    told = json.loads(json.dumps(as_json(report)))
    assert told["throughput"][0]["ratio"] == report.throughput[0].ratio
    assert [bar["what"] for bar in told["bars"]] == [bar.what for bar in bars(report)]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(headline(report))
    for table in tables(report):
        console.print(table)
    text = console.export_text()
    for word in (report.machine.cpu, CLIP.name, "What the machine allows", "T5-XXL", "bfloat16", "P99", "Bars"):
        assert word in text


def throughput(single: float, batched: float, others: float = 0.0, idle_s: float | None = None) -> Throughput:
    """The machine's peak is 100 rows a second."""

    def batch(size: int, rate: float) -> Batch:
        return Batch(size=size, rows_per_s=Spread(median=rate, low=rate, high=rate, count=1), others=others)

    return Throughput(
        encoder="x",
        dtype="float32",
        row_tokens=77,
        flop_per_row=10**9,
        peak_flops=1e11,
        batches=(batch(1, single), batch(8, batched)),
        stopped="",
        idle_s=idle_s,
    )


@pytest.mark.parametrize(
    ("single", "batched", "limit"), [(10.0, 60.0, "none"), (25.0, 60.0, "arithmetic"), (10.0, 30.0, "overhead")]
)
def test_what_keeps_batches_from_the_bar_is_named(single: float, batched: float, limit: str, report: Report) -> None:
    measured = throughput(single, batched)
    assert measured.limit == limit
    bar = bars(replace(report, throughput=[measured]))[0]
    assert bar.met == (limit == "none")
    assert ("25% of" in bar.limit and "batches of 8 60%" in bar.limit) == (limit == "arithmetic")
    assert ("10% of" in bar.limit and "batches of 8 30%" in bar.limit) == (limit == "overhead")


@pytest.mark.parametrize(
    ("others", "idle_s", "doubt"),
    [
        (0.02, 0.11, ""),
        (0.34, 0.1, "disturbed: other processes took 34% of the processors"),
        (0.0, 0.02, "one by one took 100 ms, a request to the idle pool 20 ms"),
    ],
)
def test_no_bar_is_met_by_a_ratio_in_doubt(others: float, idle_s: float, doubt: str, report: Report) -> None:
    measured = throughput(10.0, 60.0, others, idle_s)
    told = replace(report, throughput=[measured])
    bar = bars(told)[0]
    assert bar.doubt == doubt
    assert bar.met == (not doubt)
    console = Console(width=160, record=True, file=io.StringIO())
    for table in tables(told):
        console.print(table)
    assert ("in doubt" in console.export_text()) == bool(doubt)


@pytest.mark.parametrize("loss", ["killed", "hung"])
def test_redis_is_lost_in_mid_load_and_nothing_fails(tmp_path: Path, loss: Loss) -> None:
    """The pool itself stands in for the server: the same cache, without HTTP."""

    async def main(tower: TextTower, redis: EmbeddedRedis) -> None:
        cache = CacheSettings(redis_url=SecretStr(redis.url), memory_bytes=0)
        pool = EncoderPool(tower, encoder, Settings(cache=cache), InProcessMetrics())
        numbers: dict[str, int] = {}

        async def encode(text: str) -> Mapping[str, int]:
            row = random_row(CLIP, 0, numbers.setdefault(text, len(numbers)))
            (got,) = await pool.encode([EncodeUnit(encoder.fingerprint, row)])
            return {tier: int(tier == got.tier) for tier in ("memory", "redis", "encoded")}

        plan = ServicePlan(encoder=CLIP.name, concurrency=2, seconds=0.7, seed=0, timeout_s=cache.timeout_s)
        alone = ServiceLatency(encoder=CLIP.name, capacity=200.0, loads=(_latency(100.0),))
        try:
            lost = await measure_loss(encode, redis, plan, loss, alone)
        finally:
            await pool.close()
        assert not lost.failed
        assert lost.requests == 140
        assert lost.before is not None
        assert lost.after is not None
        assert 0 < lost.hits < lost.before.count
        assert lost.before.count + lost.after.count == lost.requests
        assert lost.bound == pytest.approx(cache.timeout_s + 0.02)
        assert redis.alive

    with (
        EmbeddedRedis(tmp_path / "redis", "cache") as redis,
        random_encoder(CLIP, 0, tmp_path / "encoder") as part,
    ):
        encoder = encoder_of(CLIP, part, EncoderSettings(slow_s=60))
        asyncio.run(main(TextTower.load(encoder, "cpu"), redis))


def test_a_service_is_measured_with_texts_that_nobody_has_encoded() -> None:
    seen: list[str] = []

    async def encode(text: str) -> Mapping[str, int]:
        repeated = text in seen
        seen.append(text)
        await asyncio.sleep(0.001)
        return {"memory": int(repeated), "redis": 0, "encoded": int(not repeated)}

    plan = ServicePlan(encoder="clip-l", concurrency=2, seconds=0.3, seed=0, timeout_s=0.25)
    measured = asyncio.run(measure_service(encode, plan))
    assert len(seen) == len(set(seen))
    assert not any(load.failed for load in measured.loads)


def _latency(rate: float) -> Latency:
    seconds = Percentiles(count=1, p50=0.01, p95=0.02, p99=0.02, worst=0.02)
    return Latency(what=CLIP.name, load=0.5, rate=rate, seconds=seconds, failed={})
