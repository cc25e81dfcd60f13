"""What the measurements are held against: the bars of the product, met or not, and by what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from serve.bench.encode import Report
from serve.bench.hits import SDXL_PAIR, HitLatency
from serve.bench.service import RedisLoss, ServiceLatency
from serve.bench.throughput import BAR, Throughput

MEMORY_S = 0.05e-3
REDIS_S = 2e-3
ROWS_PER_S = 1000.0
PAIR_S = 5e-3
SERVICE_S = (15e-3, 30e-3, 60e-3)
"""On a GPU. P50, P95, P99."""
_SD15_ENCODER = "clip-l"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """`limit` names what keeps the machine from a bar that was not met, where the measurements tell.

    `doubt` is why the figure can't be believed: then the bar is neither met nor missed, and `met` is False.
    """

    what: str
    wanted: str
    measured: str
    met: bool
    limit: str = ""
    doubt: str = ""


def bars(report: Report) -> list[Bar]:
    """Every bar that this run has something to say about."""
    gpu = [*_gpu_speed(report.throughput), *_gpu_service(report.services)] if report.device == "cuda" else []
    return [*_batching(report), *gpu, *_hits(report.hits), *_losses(report.losses)]


def _batching(report: Report) -> Iterator[Bar]:
    for one in report.throughput:
        limits = {
            "none": "",
            "arithmetic": f"arithmetic: {_shares(one)}, so that no batching gives more than "
            f"{one.bound / one.single:.1f}x",
            "overhead": f"what is no matrix product, or one smaller than the machine's best: {_shares(one)}",
        }
        yield Bar(
            what=f"{one.encoder}: batched over one by one",
            wanted=f">= {BAR:g}x",
            measured=f"{one.ratio:.2f}x",
            met=one.limit == "none" and not one.doubt,
            limit=limits[one.limit],
            doubt=one.doubt,
        )


def _shares(one: Throughput) -> str:
    """The rates as parts of the machine's peak."""
    best = one.best
    return (
        f"one by one takes {one.share(one.single):.0%} of this machine's best matrix product, "
        f"batches of {best.size} {one.share(best.rows_per_s.median):.0%}"
    )


def _gpu_speed(measured: Iterable[Throughput]) -> Iterator[Bar]:
    for one in measured:
        if one.encoder != _SD15_ENCODER:
            continue
        rate = one.best.rows_per_s.median
        what = f"{one.encoder}: prompts/s"
        met = rate > ROWS_PER_S  # other processes can only have lowered it
        doubt = "" if met else one.doubt
        yield Bar(what=what, wanted=f"> {ROWS_PER_S:,.0f}", measured=f"{rate:,.0f}", met=met, doubt=doubt)
        for batch in one.batches:
            if batch.size == 2:
                pair = 2 / batch.rows_per_s.median
                what = f"{one.encoder}: prompt and negative, in process"
                yield Bar(
                    what=what, wanted=f"< {1e3 * PAIR_S:g} ms", measured=f"{1e3 * pair:.2f} ms", met=pair < PAIR_S
                )


def _gpu_service(measured: Iterable[ServiceLatency]) -> Iterator[Bar]:
    for one in measured:
        seconds = one.loads[0].seconds
        if one.encoder != _SD15_ENCODER or seconds is None:
            continue
        found = (seconds.p50, seconds.p95, seconds.p99)
        yield Bar(
            what=f"{one.encoder} through the service at {one.loads[0].load:.0%}: P50/P95/P99",
            wanted="<= " + "/".join(f"{1e3 * bound:g}" for bound in SERVICE_S) + " ms",
            measured="/".join(f"{1e3 * value:.1f}" for value in found) + " ms",
            met=all(value <= bound for value, bound in zip(found, SERVICE_S, strict=True)),
        )


def _hits(measured: Iterable[HitLatency]) -> Iterator[Bar]:
    for one in measured:
        bound = MEMORY_S if one.tier == "memory" else REDIS_S
        if one.tier == "memory" or one.request == SDXL_PAIR:
            yield Bar(
                what=f"{one.tier} hit, {one.request}: P50",
                wanted=f"<= {1e3 * bound:g} ms",
                measured=f"{1e3 * one.seconds.p50:.3f} ms",
                met=one.seconds.p50 <= bound,
            )


def _losses(measured: Iterable[RedisLoss]) -> Iterator[Bar]:
    for one in measured:
        failed = sum(one.failed.values())
        what = f"Redis {one.loss} in mid-load"
        yield Bar(what=f"{what}: failed requests", wanted="0", measured=str(failed), met=failed == 0)
        if one.after is not None:
            yield Bar(
                what=f"{what}: P99 afterwards",
                wanted=f"<= {1e3 * one.bound:.0f} ms",
                measured=f"{1e3 * one.after.p99:.0f} ms",
                met=one.after.p99 <= one.bound,
            )
