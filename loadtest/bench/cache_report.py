"""What the cache was seen to be worth, as tables for people and as JSON for machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from loadtest.bench.cache import EMPTY, GUIDANCE, NEGATIVES, PROMPTS, SIDE, STEPS, Report, Traffic
from loadtest.bench.cache_meter import Counts
from loadtest.bench.cache_paired import LOAD, TEXTS, Paired, Side
from serve.bench.report import machine_line, plain_table
from serve.bench.stats import Spread
from serve.domain.text import Sign, Tier

_SIGNS = (Sign.POSITIVE, Sign.NEGATIVE, Sign.EMPTY)
_SIDES = {"cached": "with the cache", "plain": "without"}


def as_json(report: Report) -> dict[str, Any]:
    """Every figure, with those that are worked out from others."""
    told = asdict(report)
    told["plan"]["sections"] = sorted(report.plan.sections)
    for entry, one in zip(told["traffic"], report.traffic, strict=True):
        entry["counts"] = {"rows": one.counts.rows, "units": _units(one.counts)}
        entry |= {
            "rows_per_job": one.rows_per_job,
            "least_per_job": one.least_per_job,
            "without_per_job": one.without_per_job,
            "hit_rates": {sign.value: one.counts.hit_rate(sign) for sign in _SIGNS} | {"all": one.counts.hit_rate()},
        }
    if report.paired:
        ratios = {name: report.paired.ratio(name) for name in ("p50", "p95")}
        told["paired"] |= {f"{name}_ratio": each and asdict(each) for name, each in ratios.items()}
    return told


def headline(report: Report) -> str:
    plan = report.plan
    what = f"server and client on cores {', '.join(map(str, plan.budget.cores))}, cpu, float32, seed {plan.seed}"
    return machine_line(report.machine, "cpu", what, None)


def any_failed(report: Report) -> bool:
    sides = [side for one in (report.paired.rounds if report.paired else ()) for side in (one.cached, one.plain)]
    return any(one.failed for one in report.traffic) or any(side.failed for side in sides)


def tables(report: Report) -> Iterator[Table]:
    """One table a section, those without a figure left out."""
    paired = report.paired
    made = [_forwards(report.traffic), _hits(report.traffic)]
    if paired:
        made += [_latencies(paired), _rounds(paired)]
    made.append(_failures(report))
    yield from (table for table in made if table.row_count)


def _forwards(traffic: tuple[Traffic, ...]) -> Table:
    table = plain_table("Encoder forwards for each job", "texts", "jobs", "forwards", "per job", "least", "without")
    for one in traffic:
        table.add_row(
            one.name,
            str(one.done),
            str(one.counts.rows),
            f"{one.rows_per_job:.3f}",
            f"{one.least_per_job:.3f}",
            f"{one.without_per_job:.3f}",
        )
    table.caption = (
        f"Rows of token ids through the encoder, from an empty cache each; pictures of {SIDE} x {SIDE}, {STEPS} steps, "
        f"guidance {GUIDANCE:g}. {PROMPTS} prompts and {NEGATIVES} negative ones, drawn apart, {EMPTY:.0%} of these "
        "empty. Least: different rows among the orders. Without: one for each text that a job reads."
    )
    return table


def _hits(traffic: tuple[Traffic, ...]) -> Table:
    table = plain_table(
        "Where the texts came from", "texts", "sign", "texts read", "memory", "Redis", "encoded", "hits"
    )
    for one in traffic:
        for sign in (*_SIGNS, None):
            read = sum(number for (_, each), number in one.counts.units.items() if sign in (None, each))
            if read:
                rates = (one.counts.rate(tier, sign) for tier in (Tier.MEMORY, Tier.REDIS, Tier.ENCODED))
                cells = (*map(_share, rates), _share(one.counts.hit_rate(sign)))
                table.add_row(one.name if sign is Sign.POSITIVE else "", sign or "all", str(read), *cells)
    table.caption = (
        "By the server's own counters. A text that was encoded while its job waited counts as encoded, also where "
        "another job's forward brought it."
    )
    return table


def _latencies(paired: Paired) -> Table:
    what = " and ".join(paired.encoders)
    table = plain_table(f"Latency of {what}, ms", "", "requests/s", "requests", "hits", "P50", "P95", "P50 of hits")
    for name, title in _SIDES.items():
        sides: list[Side] = [getattr(one, name) for one in paired.rounds]
        hits = [side.hits for side in sides if side.hits is not None]
        table.add_row(
            title,
            f"{paired.rate:.2f}",
            str(sum(one.requests for one in paired.rounds)),
            _share(sum(hits) / len(hits) if hits else None),
            _spread(paired.seconds(name, "p50"), 1e3, 1) or "never",
            _spread(paired.seconds(name, "p95"), 1e3, 1) or "never",
            _spread(_of([side.hit_seconds.p50 for side in sides if side.hit_seconds]), 1e3, 1),
        )
    ratios = (_spread(paired.ratio(name), 1.0, 3) for name in ("p50", "p95"))
    table.add_row("with over without", "", "", "", *ratios, "")
    table.caption = (
        f"POST /v1/embeddings, open loop (Poisson) at {LOAD:.0%} of {paired.capacity:.2f} requests/s, which the server "
        f"without a cache was measured to carry; Zipf 1.0 over {TEXTS} texts, the same texts at the same times through "
        "both, in turns, each round from an empty cache. Median and range of the rounds; a request without an answer "
        "took for ever. Random weights."
    )
    return table


def _rounds(paired: Paired) -> Table:
    table = plain_table("Round by round, ms", "round", "requests", "texts", "hits", "P50", "P95", "P50 without", "P95")
    for number, one in enumerate(paired.rounds, 1):
        cells = [
            "never" if (found := getattr(side.seconds, name)) is None else f"{1e3 * found:,.1f}"
            for side in (one.cached, one.plain)
            for name in ("p50", "p95")
        ]
        table.add_row(str(number), str(one.requests), str(one.texts), _share(one.cached.hits), *cells)
    return table


def _failures(report: Report) -> Table:
    table = plain_table("Failed requests", "in", "reason", "requests")
    named = [(one.name, one.failed) for one in report.traffic]
    for number, one in enumerate(report.paired.rounds if report.paired else (), 1):
        named += [
            (f"round {number}, with the cache", one.cached.failed),
            (f"round {number}, without", one.plain.failed),
        ]
    for what, failed in named:
        for reason, number in failed.items():
            table.add_row(what, Text(reason), str(number))
    return table


def _units(counts: Counts) -> dict[str, dict[str, int]]:
    return {sign.value: {tier.value: counts.units.get((tier.value, sign.value), 0) for tier in Tier} for sign in _SIGNS}


def _of(values: Sequence[float]) -> Spread | None:
    return Spread.of(values) if values else None


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _spread(spread: Spread | None, factor: float, digits: int) -> str:
    if spread is None:
        return ""
    median, low, high = (f"{factor * value:,.{digits}f}" for value in (spread.median, spread.low, spread.high))
    return f"{median} ({low}-{high})"
