"""What `tandem simulate` prints."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from serve.simulate.answer import Answer
from serve.simulate.outcome import Outcome, PoolUse
from serve.telemetry.logs import escape


def show(answer: Answer, console: Console | None = None) -> None:
    console = console or Console(highlight=False, markup=False)
    found = answer.outcome
    console.print(_headline(found))
    console.print(_pools(found))
    console.print(_redis(answer))
    if answer.shards:
        console.print(_shards(answer))
    if answer.sizes:
        console.print(_sizes(answer))
    if any(each.scaled for each in answer.sizes):
        console.print(_scaled(answer))


def _headline(found: Outcome) -> str:
    orders = len(found.fates)
    ends = ", ".join(f"{number:,} {how}" for how, number in sorted(found.counts.items()))
    part = f" (one of {found.slices} equal slices of fleet and traffic)" if found.slices > 1 else ""
    times = ", ".join(f"P{each} {_seconds(found.latency_s(each))}" for each in (50, 95, 99))
    return (
        f"{escape(found.name)}: {_span(found.duration_s)}, {orders:,} orders{part}: {ends}\n"
        f"latency {times}; simulated in {found.took_s:.1f} s"
    )


def _pools(found: Outcome) -> Table:
    scales = any(pool.least < pool.most for pool in found.pools)
    table = _table(
        "pool", "model", "class", "cards", *(["changes"] if scales else []), "rung", "busy", "images", "lost", "cost"
    )
    for pool in found.pools:
        table.add_row(
            escape(pool.name),
            pool.model,
            escape(pool.gpu_class),
            _cards(pool, found.slices),
            *([f"{pool.changes:,}"] if scales else []),
            pool.rung,
            f"{100 * pool.busy:.0f} %",
            f"{found.slices * pool.images:,}",
            f"{found.slices * pool.lost:,}",
            f"{found.slices * pool.cost:,.2f}",
        )
    return table


def _cards(pool: PoolUse, slices: int) -> str:
    if pool.least == pool.most:
        return f"{slices * pool.replicas:,}"
    return f"{slices * pool.least:,} to {slices * pool.most:,}"


def _redis(answer: Answer) -> str:
    found, redis = answer.outcome, answer.outcome.redis
    orders = found.slices * len(found.fates) / found.duration_s
    most = ", ".join(
        f"{name} {_short(100 * busy / redis.duration_s)} %"
        for name, busy in sorted(redis.busy_s.items(), key=lambda each: -each[1])[:3]
    )
    warning = "" if redis.share <= 1 else "\nIt does not keep up: the latencies above are those without that."
    return (
        f"One job Redis: {redis.calls_per_s:,.0f} calls a second, {_short(100 * redis.share)} % busy (most: {most}).\n"
        f"It is full at {_short(redis.growth)} times this fleet and traffic: "
        f"{redis.growth * orders:,.1f} orders a second."
        f"{warning}"
    )


def _shards(answer: Answer) -> Table:
    table = _table("shards by tenant", "busiest has", "its Redis", "its P95 at the peak")
    for each in answer.shards:
        table.add_row(
            str(each.number), f"{100 * each.share:.0f} %", f"{_short(100 * each.redis)} %", _seconds(each.p95_s)
        )
    return table


def _sizes(answer: Answer) -> Table:
    table = _table(f"P95 of {answer.p95_s:g} s", "model", "class", "cards", "P95", "busy", "cost/h", "cost/1000")
    for each in answer.sizes:
        name = escape(each.pool)
        if each.replicas is None:
            table.add_row(name, each.model, escape(each.gpu_class), f"none: {escape(each.why)}")
        else:
            figures = f"{100 * each.busy:.0f} %", f"{each.cost_per_hour:.2f}", f"{each.cost_per_1000:.2f}"
            cards = f"{each.replicas:,}"
            table.add_row(name, each.model, escape(each.gpu_class), cards, _seconds(each.p95_s), *figures)
    return table


def _scaled(answer: Answer) -> Table:
    table = _table("autoscaled", "cards", "cost/h", "P95", "in the worst minutes", "changes")
    for name, each in ((size.pool, size.scaled) for size in answer.sizes):
        if each is not None:
            cards = f"{each.least:,} to {each.most:,}"
            times = _seconds(each.p95_s), _seconds(each.worst_s)
            table.add_row(escape(name), cards, f"{each.cost_per_hour:.2f}", *times, f"{each.changes:,}")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _seconds(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f} s"


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h" if seconds >= 3600 else f"{seconds:g} s"


def _short(value: float) -> str:
    """Two figures, and whole numbers as they are."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
