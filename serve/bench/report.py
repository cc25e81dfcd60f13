"""A report as tables for people and as JSON for machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from serve.bench.bars import bars
from serve.bench.encode import Report
from serve.bench.load import Latency
from serve.bench.machine import Machine
from serve.bench.stats import Percentiles, Spread
from serve.bench.throughput import Throughput
from serve.bench.windows import DISTURBED

_GB = 1e9
_OPEN_LOOP = "Open loop, from the time at which a request was due; every text is new. Load: of the capacity."


def as_json(report: Report) -> dict[str, Any]:
    """Every figure, with those that are worked out from others, and the bars."""
    told = asdict(report)
    for entry, one in zip(told["throughput"], report.throughput, strict=True):
        entry |= {
            "single_rows_per_s": one.single,
            "best_size": one.best.size,
            "best_rows_per_s": one.best.rows_per_s.median,
            "ratio": one.ratio,
            "bound_rows_per_s": one.bound,
            "single_share_of_peak": one.share(one.single),
            "best_share_of_peak": one.share(one.best.rows_per_s.median),
            "limit": one.limit,
            "doubt": one.doubt,
        }
    return told | {"bars": [asdict(bar) for bar in bars(report)]}


def headline(report: Report) -> str:
    """The machine and the run in one line."""
    what = f"{report.device}, {report.dtype}, seed {report.seed}"
    return machine_line(report.machine, report.device, what, report.other_work)


def machine_line(machine: Machine, device: str, what: str, other_work: float | None) -> str:
    """`what` was measured on this machine, in one line."""
    where = machine.gpu if device == "cuda" else f"{machine.cpu}, {machine.cores} cores"
    others = "" if other_work is None else f"; other processes took {other_work:.0%} of the processors"
    return (
        f"{where}; {machine.memory_bytes / _GB:.0f} GB; {machine.system}; Python {machine.python}, "
        f"torch {machine.torch} with {machine.threads} threads; {what}{others}"
    )


def tables(report: Report) -> Iterator[Table]:
    """One table a section, those without a figure left out; the bars last."""
    made = (
        _throughput(report),
        _limits(report),
        _pools(report),
        _services(report),
        _hits(report),
        _precisions(report),
        _stored(report),
        _losses(report),
        _failures(report),
        _bars(report),
    )
    yield from (table for table in made if table.row_count)


def _throughput(report: Report) -> Table:
    table = plain_table("Prompts a second, one encoder", "encoder", "one by one", "batched", "ratio", "rows", "")
    table.caption = "Median and range of repeated windows, all sizes in turns; random weights, every row different."
    for one in report.throughput:
        single, best = one.batches[0].rows_per_s, one.best
        ratio, size = f"{one.ratio:.2f}x", str(best.size)
        then = Text(one.doubt, style="yellow") if one.doubt else one.stopped
        table.add_row(one.encoder, spread_text(single), spread_text(best.rows_per_s), ratio, size, then)
    return table


def _limits(report: Report) -> Table:
    columns = ("encoder", "GFLOP a row", "peak GFLOP/s", "bound rows/s", "one by one", "batched", "limit")
    table = plain_table("What the machine allows", *columns)
    table.caption = "Bound: the machine's best matrix product over the encoder's own operations. Then shares of it."
    for one in report.throughput:
        table.add_row(*_limit_cells(one))
    return table


def _limit_cells(one: Throughput) -> tuple[str, ...]:
    return (
        one.encoder,
        f"{one.flop_per_row / 1e9:.1f}",
        f"{one.peak_flops / 1e9:,.0f}",
        f"{one.bound:,.1f}",
        f"{one.share(one.single):.0%}",
        f"{one.share(one.best.rows_per_s.median):.0%}",
        "in doubt" if one.doubt else one.limit,
    )


def _pools(report: Report) -> Table:
    table = _latency_table("Latency of one pool in process, ms", "pool")
    for one in report.pools:
        table.add_row(one.encoder, "idle", "", *percentile_cells(one.miss), "0")
        for load in one.loads:
            table.add_row(*_load_cells(load))
    return table


def _services(report: Report) -> Table:
    table = _latency_table("Latency of the service over HTTP, ms", "encoder")
    threads = "" if report.device != "cpu" else f" Encoders with {report.machine.threads} threads, as in process."
    table.caption = f"{_OPEN_LOOP}{threads}"
    for one in report.services:
        for load in one.loads:
            table.add_row(*_load_cells(load))
    return table


def _hits(report: Report) -> Table:
    table = plain_table("A cache hit, ms", "tier", "request", "kB", "samples", "P50", "P95", "P99", "worst")
    for one in report.hits:
        table.add_row(one.tier, one.request, f"{one.bytes / 1e3:,.0f}", *percentile_cells(one.seconds, 3))
    return table


def _precisions(report: Report) -> Table:
    columns = ("encoder", "dtype", "weights", "MB", "rows", "rows/s", "cosine, mean", "cosine, least")
    table = plain_table("Precision and form of the weights", *columns)
    table.caption = "Cosine to float32, token by token. Of random weights: real ones have outliers that these lack."
    for one in report.precisions:
        if one.refused is not None or one.rows_per_s is None or one.cosine is None:
            table.add_row(one.encoder, one.dtype, one.form, "", "", Text(one.refused or "", style="dim"))
            continue
        table.add_row(
            one.encoder,
            one.dtype,
            "" if one.form == "plain" else one.form,
            f"{(one.bytes or 0) / 1e6:,.0f}",
            str(one.batch),
            spread_text(one.rows_per_s) + (f", disturbed: {one.others:.0%}" if one.others > DISTURBED else ""),
            f"{one.cosine.mean:.6f}",
            f"{one.cosine.least:.6f}",
        )
    return table


def _stored(report: Report) -> Table:
    table = plain_table("Cached values", "encoder", "dtype", "exact kB", "int8 kB", "cosine, mean", "cosine, least")
    for one in report.stored:
        table.add_row(
            one.encoder,
            one.dtype,
            f"{one.exact_bytes / 1e3:,.0f}",
            f"{one.int8_bytes / 1e3:,.0f}",
            f"{one.cosine.mean:.6f}",
            f"{one.cosine.least:.6f}",
        )
    return table


def _losses(report: Report) -> Table:
    columns = ("Redis", "requests", "hits", "failed", "P50 before", "P99 before", "P50 after", "P99 after", "bound")
    table = plain_table("Redis lost in mid-load, ms", *columns)
    table.caption = "Bound: the cache's timeout and the P99 of the same load without a cache."
    for one in report.losses:
        sides = [
            text
            for side in (one.before, one.after)
            for text in (("", "") if side is None else (_ms(side.p50), _ms(side.p99)))
        ]
        failed = str(sum(one.failed.values()))
        table.add_row(one.loss, str(one.requests), str(one.hits), failed, *sides, _ms(one.bound))
    return table


def _failures(report: Report) -> Table:
    table = plain_table("Failed requests", "in", "reason", "requests")
    named = [(load.what, load.failed) for pool in report.pools for load in pool.loads]
    named += [(f"{load.what} over HTTP", load.failed) for service in report.services for load in service.loads]
    named += [(f"Redis {loss.loss}", loss.failed) for loss in report.losses]
    for what, failed in named:
        for reason, requests in failed.items():
            table.add_row(what, Text(reason), str(requests))
    return table


def _bars(report: Report) -> Table:
    table = Table("bar", "wanted", "measured", "", "limit", title="Bars", box=SIMPLE_HEAD)
    for bar in bars(report):
        verdict = "met" if bar.met else "in doubt" if bar.doubt else "not met"
        style = "green" if bar.met else "yellow"
        table.add_row(bar.what, bar.wanted, bar.measured, Text(verdict, style=style), bar.doubt or bar.limit)
    return table


def _latency_table(title: str, first: str) -> Table:
    columns = (first, "load", "requests/s", "samples", "P50", "P95", "P99", "worst", "failed")
    table = plain_table(title, *columns)
    table.caption = _OPEN_LOOP
    return table


def _load_cells(one: Latency) -> tuple[str, ...]:
    cells = ("0", "", "", "", "") if one.seconds is None else percentile_cells(one.seconds)
    return (one.what, f"{one.load:.0%}", f"{one.rate:.2f}", *cells, str(sum(one.failed.values())))


def percentile_cells(of: Percentiles, digits: int = 1) -> tuple[str, ...]:
    return (str(of.count), *(_ms(value, digits) for value in (of.p50, of.p95, of.p99, of.worst)))


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their whole names: room.field."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def plain_table(title: str, *columns: str) -> Table:
    """The first column is a name; figures stand to the right."""
    table = Table(title=title, box=SIMPLE_HEAD, caption_justify="left", title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def spread_text(spread: Spread) -> str:
    digits = 0 if spread.median >= 1000 else 1 if spread.median >= 10 else 2
    return f"{spread.median:,.{digits}f} ({spread.low:,.{digits}f}-{spread.high:,.{digits}f})"


def _ms(seconds: float, digits: int = 1) -> str:
    return f"{1e3 * seconds:,.{digits}f}"
