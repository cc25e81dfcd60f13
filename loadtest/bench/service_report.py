"""The report of `tandem bench service` as tables for people and as JSON for machines, with the bars that it is held
against, and against an earlier run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from loadtest.bench.service import Report
from loadtest.bench.service_figures import figures
from loadtest.bench.service_overhead import Overhead
from loadtest.bench.service_redis import DIALECTS, SERVERS, RedisCosts
from loadtest.bench.service_start import Memory
from loadtest.processes import DIFFUSION, ROLES
from serve.bench.bars import Bar
from serve.bench.report import flat, machine_line, plain_table, spread_text
from serve.bench.stats import Spread

RATIO = 0.95
"""Of the bare engine's work, what the service wants to do."""
OTHERS = 0.05
"""Of the diffusion replica's CPU, what all other processes of the server may take."""
ADDED_S = 15e-3
DISTURBED = 0.05
_LEAST_CALLS = 0.05
"""A job; less of a command is the clock's."""


def as_json(report: Report) -> dict[str, Any]:
    return asdict(report) | {"bars": [asdict(bar) for bar in bars(report)]}


def headline(report: Report) -> str:
    what = f"shapes, cores {','.join(map(str, report.cores))}, seed {report.seed}"
    given = [f"{name}={value}" for name, value in (*flat(report.settings), *report.environ.items())]
    return machine_line(report.machine, "cpu", ", ".join([what, *given]), report.other_work)


def tables(report: Report, earlier: Mapping[str, Any] | None = None) -> Iterator[Table]:
    """`earlier` is the JSON of another run."""
    if report.saturated:
        yield _saturated(report)
        yield _cpu(report)
        yield _threads(report)
    if report.overhead:
        yield _overhead(report)
        yield _stages(report)
    if report.redis:
        yield _trips(report.redis)
        yield _commands(report.redis)
    if report.starts:
        yield _starts(report)
    if report.memory:
        yield _memory(report)
    if found := list(bars(report)):
        yield _bars(found)
    if earlier is not None:
        yield _against(report, earlier)


def bars(report: Report) -> Iterator[Bar]:
    doubt = ""
    if report.other_work is not None and report.other_work > DISTURBED:
        doubt = f"disturbed: other processes took {report.other_work:.0%} of the processors"
    if report.saturated:
        one = report.saturated
        failed = sum(one.failed.values())
        unsure = f"{failed} orders failed" if failed else doubt
        yield _bar(
            "saturated, over the bare engine",
            f">= {RATIO:.0%}",
            f"{one.ratio.median:.1%}",
            one.ratio.median >= RATIO,
            unsure,
        )
        share = one.others.median
        yield _bar("CPU of all others, over diffusion's", f"<= {OTHERS:.0%}", f"{share:.1%}", share <= OTHERS, doubt)
    for each in report.overhead:
        if each.text == "cached":
            for what, added in (("answered", each.added), ("picture fetched", each.added_fetched)):
                yield _bar(
                    f"{each.steps} steps on an idle system, {what}: P50 over the bare engine's",
                    f"<= {1e3 * ADDED_S:g} ms",
                    f"{1e3 * added.median:.1f} ms",
                    added.median <= ADDED_S,
                    doubt,
                )


def _bar(what: str, wanted: str, measured: str, met: bool, doubt: str) -> Bar:
    """A figure of a disturbed run is in doubt whichever way it points: others' work may have hit the bare engine."""
    return Bar(what=what, wanted=wanted, measured=measured, met=met and not doubt, doubt=doubt)


def _saturated(report: Report) -> Table:
    assert report.saturated is not None
    one = report.saturated
    table = plain_table(f"Mixed work, {one.users} users always waiting", "", "images/s", "over the bare engine")
    table.caption = (
        f"{one.tandem.count} rounds of {one.orders} orders, the same through both, in turns, the bare engine's without "
        f"a server; images of the mean order. At most {one.in_hand} in hand on both sides; text encoded before both. "
        "Bare: no PNG, no nice threads."
    )
    table.add_row("bare engine", _precise(one.bare), "")
    table.add_row("through HTTP", _precise(one.tandem), f"{_percents(one.ratio)}")
    for reason, count in one.failed.items():
        table.add_row(Text(f"failed: {reason}"), str(count), "")
    return table


def _cpu(report: Report) -> Table:
    assert report.saturated is not None
    one = report.saturated
    columns = ("process", "CPU ms an image", "of diffusion's", "idle, ms a second")
    table = plain_table("Where the CPU goes, by process", *columns)
    table.caption = (
        f"Of all others: {_percents(one.others)}. Idle: what the server took before its first turn. The "
        "client is what sends the orders, Locust."
    )
    engine = one.roles.get(DIFFUSION, 0.0)
    for role in (role for role in ROLES if role in one.roles):
        share = f"{one.roles[role] / engine:.1%}" if engine else ""
        table.add_row(role, f"{1e3 * one.roles[role]:.2f}", share, f"{1e3 * one.idle.get(role, 0.0):.1f}")
    table.add_row("client", f"{1e3 * one.client:.2f}", f"{one.client / engine:.1%}" if engine else "", "")
    bare = sum(one.bare_threads.values())
    table.add_row("bare engine", f"{1e3 * bare:.2f}", f"{bare / engine:.1%}" if engine else "", "")
    return table


def _threads(report: Report) -> Table:
    assert report.saturated is not None
    one = report.saturated
    table = plain_table("Inside the processes that draw, CPU ms an image", "threads", "diffusion", "bare engine")
    table.caption = (
        "The rest: asyncio, Redis, PNG, Ray. `engine and vae`: the nice threads of the replica, which have no names."
    )
    for name in dict.fromkeys([*one.bare_threads, *one.threads]):
        cells = (f"{1e3 * side[name]:.2f}" if name in side else "" for side in (one.threads, one.bare_threads))
        table.add_row(name, *cells)
    return table


def _overhead(report: Report) -> Table:
    columns = ("order", "pairs", "bare P50", "answered P50", "fetched P50", "P95", "added", "added, fetched")
    table = plain_table("One request at a time on an idle system, ms", *columns)
    table.caption = (
        "Answered: POST /v1/jobs?wait=true; fetched: and GET of its picture, P95 of that. Added: median less the bare "
        "engine's, and that of fifths of the run. Both beside the idle server, in pairs. Fresh text: encoded for "
        "this order, which the bare engine never has."
    )
    for one in report.overhead:
        table.add_row(
            _name(one),
            str(one.bare.count),
            *(f"{1e3 * seconds:.1f}" for seconds in (one.bare.p50, one.answered.p50, one.fetched.p50, one.fetched.p95)),
            _ms(one.added),
            _ms(one.added_fetched),
        )
    return table


def _stages(report: Report) -> Table:
    table = plain_table("Where it goes, median ms", "stage", *(_name(one) for one in report.overhead))
    table.caption = (
        "Stages as the job's `timings` have them; in brackets the bare engine's. Proxy and network: what the client "
        "waited for the answer beyond admission, total and told."
    )
    for name in dict.fromkeys(name for one in report.overhead for name in one.stages):
        table.add_row(name, *(_stage_cell(one, name) for one in report.overhead))
    table.add_row("explained by the stages", *(f"{one.explained:.1%}" for one in report.overhead))
    return table


def _stage_cell(one: Overhead, name: str) -> str:
    if name not in one.stages:
        return ""
    bare = f" ({1e3 * one.bare_stages[name]:.2f})" if name in one.bare_stages else ""
    return f"{1e3 * one.stages[name]:.2f}{bare}"


def _trips(costs: RedisCosts) -> Table:
    columns = ("client", "steps", "jobs", "failed", *(f"{name}: trips" for name in SERVERS), "commands", "a step more")
    table = plain_table("Redis, round trips and commands of one job", *columns)
    idle = ", ".join(f"{name} {costs.idle[name].trips:.1f}" for name in SERVERS if name in costs.idle)
    table.caption = (
        "One job at a time. Trips: reads from clients' sockets; commands: those inside of scripts too, both servers. "
        f"What the idle server does is subtracted (trips a second: {idle}). A step more: trips that each step adds."
    )
    for one in costs.costs:
        calls = sum(sum(by.values()) for by in one.calls.values())
        trips = (f"{one.trips[name]:.1f}" for name in SERVERS)
        growth = f"{costs.growth(one.dialect):.2f}" if one.steps == max(each.steps for each in costs.costs) else ""
        table.add_row(one.dialect, str(one.steps), str(one.jobs), str(one.failed), *trips, f"{calls:.1f}", growth)
    return table


def _commands(costs: RedisCosts) -> Table:
    kinds = [one for dialect in DIALECTS for one in costs.costs if one.dialect == dialect]
    table = plain_table("Redis, commands of one job", "command", *(f"{one.dialect} {one.steps}" for one in kinds))
    totals = dict[tuple[str, str], float]()
    for one in kinds:
        for server, by in one.calls.items():
            for command, calls in by.items():
                totals[server, command] = totals.get((server, command), 0.0) + calls
    for server, command in sorted(totals, key=lambda name: -totals[name]):
        made = [one.calls[server].get(command, 0.0) for one in kinds]
        if max(made) >= _LEAST_CALLS:
            table.add_row(
                f"{server}: {command}", *(f"{each:.1f}" if abs(each) >= _LEAST_CALLS else "" for each in made)
            )
    return table


def _starts(report: Report) -> Table:
    assert report.starts is not None
    one = report.starts
    table = plain_table("From exec on a new data_dir, s", "", "seconds")
    table.caption = f"{one.first_image.count} starts. Phases: medians, one after the other, by when processes begin."
    for phase, seconds in one.phases.items():
        table.add_row(phase, f"{seconds:.2f}")
    if one.profile:
        table.add_row("of it: steps measured, at the first start alone", _precise(one.profile))
    if one.ready:
        table.add_row("ready", _precise(one.ready))
    table.add_row("first image", _precise(one.first_image))
    return table


def _memory(report: Report) -> Table:
    columns = ("process", "", "number", "RSS", "PSS", "USS", "PSS later", "threads", "files")
    table = plain_table("Memory, MB", *columns)
    table.columns[1].justify = "left"
    table.caption = (
        "After the first image; later: after the sections `redis` and `overhead`. PSS adds up, RSS counts shared pages "
        "everywhere."
    )
    later = {(one.role, one.name): one for one in report.memory_later}
    for one in report.memory:
        table.add_row(*_memory_cells(one, later.get((one.role, one.name))))
    after = _mb(_total(report.memory_later)) if report.memory_later else ""
    rss = sum(one.rss for one in report.memory)
    table.add_row("all", "", "", _mb(rss), _mb(_total(report.memory)), "", after, "", "")
    return table


def _memory_cells(one: Memory, later: Memory | None) -> tuple[str, ...]:
    after = _mb(later.pss) if later else ""
    sizes = (_mb(one.rss), _mb(one.pss), _mb(one.uss), after)
    return (one.role, Text(one.name).plain[:40], str(one.processes), *sizes, str(one.threads), str(one.fds))


def _total(memory: tuple[Memory, ...]) -> int:
    """PSS, where it is known; else RSS."""
    return sum(one.rss if one.pss is None else one.pss for one in memory)


def _bars(found: list[Bar]) -> Table:
    table = Table("bar", "wanted", "measured", "", "limit", title="Bars", box=SIMPLE_HEAD)
    for bar in found:
        verdict = "met" if bar.met else "in doubt" if bar.doubt else "not met"
        style = "green" if bar.met else "yellow"
        table.add_row(bar.what, bar.wanted, bar.measured, Text(verdict, style=style), bar.doubt or bar.limit)
    return table


def _against(report: Report, earlier: Mapping[str, Any]) -> Table:
    table = plain_table("Against the earlier run", "", "earlier", "now", "ratio")
    table.caption = "Two runs, not one: what else the machine did differs too."
    now, then = figures(as_json(report)), figures(earlier)
    for name in (name for name in now if name in then):
        ratio = f"{now[name] / then[name]:.2f}x" if then[name] else ""
        table.add_row(name, f"{then[name]:,.3f}", f"{now[name]:,.3f}", ratio)
    return table


def _name(one: Overhead) -> str:
    return f"{one.steps} steps" if one.text == "cached" else f"{one.steps} steps, {one.text} text"


def _precise(spread: Spread) -> str:
    return spread_text(spread) if spread.count > 1 else f"{spread.median:,.2f}"


def _percents(spread: Spread) -> str:
    if spread.count == 1:
        return f"{spread.median:.1%}"
    return f"{spread.median:.1%} ({spread.low:.1%}-{spread.high:.1%})"


def _ms(spread: Spread) -> str:
    return f"{1e3 * spread.median:.1f} ({1e3 * spread.low:.1f}-{1e3 * spread.high:.1f})"


def _mb(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.0f}"
