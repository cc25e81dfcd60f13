"""The bars of the comparison: met, not met, or in doubt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from loadtest.bench.compare_plan import Capacity, Paced, Report, Stage, shares
from loadtest.bench.compare_ratios import GOODPUT, OVERLOAD, P95, ratios, throughput_name
from loadtest.servers import TANDEM
from serve.bench.bars import Bar
from serve.bench.report import spread_text
from serve.bench.stats import Percentiles, Spread
from serve.bench.windows import DISTURBED

THROUGHPUT_RATIO = 2.0
"""Tandem's over that of one image at a time."""
ONE_AT_A_TIME = "lock"
P95_RATIO = 0.5
"""Tandem's P95 over the best baseline's at the same rate."""
GOODPUT_RATIO = 0.95
REFUSAL_S = 0.05


def bars(report: Report) -> Iterator[Bar]:
    """A figure of a disturbed run is in doubt whichever way it points: others' work may have hit either side."""
    measured = {one.name: one for one in ratios(report)}
    same = [one for one in report.paced if one.of == TANDEM]
    climbs = [one for one in report.stages if one.server == TANDEM]
    if one := measured.get(throughput_name(ONE_AT_A_TIME)):
        sides = [each for each in report.capacities if each.server in (TANDEM, ONE_AT_A_TIME)]
        what = f"saturated throughput over a one-at-a-time diffusers server's ({ONE_AT_A_TIME}) on mixed traffic"
        met = one.value.median >= THROUGHPUT_RATIO
        yield _bar(what, f">= {THROUGHPUT_RATIO:g}x", f"{ratio_text(one.value)}x", met, _doubt(sides))
    if P95 in measured:
        yield _p95_bar(report, measured[P95].value, same)
    if GOODPUT in measured:
        value = measured[GOODPUT].value
        what = f"goodput at {OVERLOAD:g}x Tandem's capacity, over the peak"
        yield _bar(what, f">= {GOODPUT_RATIO:g}", ratio_text(value), value.median >= GOODPUT_RATIO, _doubt(climbs))
    yield from _refusal_bars([one for one in climbs if one.factor == OVERLOAD])


def _p95_bar(report: Report, value: Spread, same: Sequence[Paced]) -> Bar:
    """Says how far the quickest baseline is from its own capacity at this rate: beyond it, its line grows for as long
    as the run lasts, and so does its P95."""
    load = report.plan.load
    share = load * report.capacity(TANDEM) / max(map(report.capacity, report.baselines))
    what = f"P95 at {load:.0%} of Tandem's capacity ({share:.0%} of the quickest baseline's), over the best baseline's"
    notes = [ratio_text(value)]
    if share > 1:
        notes.append("beyond the baseline's capacity: depends on the run's length")
    if not value.low:
        notes.append("0: no baseline had a picture for 95 of 100 orders")
    return _bar(what, f"<= {P95_RATIO:g}", "; ".join(notes), value.median <= P95_RATIO, _doubt(same))


def _refusal_bars(stages: Sequence[Stage]) -> Iterator[Bar]:
    """From the intended send time; the server's own time is told beside it: the client shares the cores."""
    found = [
        (one.offered.window.refusals, one.offered.window.refusals_own)
        for one in stages
        if one.offered.window.refusals and one.offered.window.refusals_own
    ]
    for name, pick in (("P50", p50), ("P99", p99)):
        if found:
            told = [1e3 * pick(intended) for intended, _ in found]
            own = [1e3 * pick(sent) for _, sent in found]
            yield _bar(
                f"refusals at {OVERLOAD:g}x: {name} from the intended time",
                f"< {1e3 * REFUSAL_S:g} ms",
                f"{range_text(told)} ms; from when it was sent {range_text(own)} ms",
                median(told) < 1e3 * REFUSAL_S,
                _doubt(stages),
            )


def p50(of: Percentiles) -> float:
    return of.p50


def p99(of: Percentiles) -> float:
    return of.p99


def _doubt(measured: Iterable[Capacity | Paced | Stage]) -> str:
    others = shares(measured) or 0.0
    return f"disturbed: other processes took {others:.0%} of the processors" if others > DISTURBED else ""


def _bar(what: str, wanted: str, measured: str, met: bool, doubt: str) -> Bar:
    return Bar(what=what, wanted=wanted, measured=measured, met=met and not doubt, doubt=doubt)


def range_text(values: Sequence[float]) -> str:
    """The median, and the range where there is one."""
    spread = Spread.of(values)
    return spread_text(spread) if spread.low < spread.high else f"{spread.median:,.2f}"


def ratio_text(of: Spread) -> str:
    if of.low == of.high:
        return f"{of.median:.2f}"
    return f"{of.median:.2f} ({of.low:.2f}-{of.high:.2f})"
