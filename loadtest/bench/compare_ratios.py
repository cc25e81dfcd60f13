"""The ratios of a comparison, and whether they got worse than those on record: a slower machine changes both sides of a
ratio, a slower Tandem one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loadtest.bench.compare_plan import PEAK, Paced, Plan, Report, Stage
from loadtest.servers import TANDEM
from serve.bench.stats import Spread
from serve.errors import OperatorError

RECORD = Path(__file__).with_name("ratios.json")
"""The ratios that a change of Tandem is held to."""
OVERLOAD = 5.0
"""The multiple of the capacity at which goodput must hold."""
_Measured = TypeVar("_Measured", Paced, Stage)

P95 = "P95 at the same rate: tandem / best baseline"
SHORT = "short form, saturated throughput: tandem / lock"
"""Of tests/cluster/test_bench_ratios.py alone: fewer users and orders, all but one core's threads, beside an idle
Tandem."""
GOODPUT = f"goodput: {OVERLOAD:g}x overload / peak"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """`value` is over the rounds."""

    name: str
    value: Spread
    higher_is_better: bool

    def worse_by(self, recorded: float) -> float:
        """How far the median is on the wrong side of a recorded one; 0 or less: it is not."""
        return recorded - self.value.median if self.higher_is_better else self.value.median - recorded


class Measured(BaseModel):
    """Where a ratio on record comes from, for people: when, on which machine, by which command, how often."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    on: date
    machine: str = Field(min_length=1)
    by: str = Field(min_length=1)
    rounds: int = Field(ge=1)

    def __str__(self) -> str:
        return f"{self.on}, {self.machine}, {self.by}, rounds {self.rounds}"


class Recorded(BaseModel):
    """A ratio on record. It got worse when it is on the wrong side of `value` by more than `tolerance`. `measured` is
    None for a bound that was set, not measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float = Field(gt=0)
    tolerance: float = Field(ge=0)
    measured: Measured | None = None


class Record(BaseModel):
    """Ratios by their names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratios: Mapping[str, Recorded] = Field(min_length=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A ratio beside the one on record."""

    ratio: Ratio
    recorded: Recorded

    @property
    def worse(self) -> bool:
        return self.ratio.worse_by(self.recorded.value) > self.recorded.tolerance


def throughput_name(baseline: str) -> str:
    return f"saturated throughput: tandem / {baseline}"


def throughput(baseline: str, own: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of the rates of as many windows, in turns."""
    values = [mine / other for mine, other in zip(own, theirs, strict=True)]
    return Ratio(name=throughput_name(baseline), value=Spread.of(values), higher_is_better=True)


def ratios(report: Report) -> Iterator[Ratio]:
    """Those that the run has something to say about."""
    own = [one.rate.median for one in report.saturated(TANDEM)]
    for name in report.baselines:
        yield throughput(name, own, [one.rate.median for one in report.saturated(name)])
    if found := [ratio for ratio in map(p95_ratio, by_round(report.paced)) if ratio is not None]:
        yield Ratio(name=P95, value=Spread.of(found), higher_is_better=False)
    stages = [one for one in report.stages if one.server == TANDEM]
    if found := [ratio for ratio in map(goodput_ratio, by_round(stages)) if ratio is not None]:
        yield Ratio(name=GOODPUT, value=Spread.of(found), higher_is_better=True)


def by_round(measured: Iterable[_Measured]) -> list[list[_Measured]]:
    rounds: dict[int, list[_Measured]] = {}
    for one in measured:
        rounds.setdefault(one.round, []).append(one)
    return list(rounds.values())


def p95_ratio(turn: Iterable[Paced]) -> float | None:
    """Tandem's P95 over the least of the baselines', at the same arrivals: the hardest rival of that round.

    A side of which more than one in twenty orders got no picture has an endless P95: infinite where that is Tandem,
    0 where it is every baseline. None where a side was not measured.
    """
    tails = {one.server: one.offered.window.tail.p95 for one in turn if one.of == TANDEM}
    if TANDEM not in tails or len(tails) < 2:
        return None
    own, *theirs = (
        math.inf if p95 is None else p95 for _, p95 in sorted(tails.items(), key=lambda tail: tail[0] != TANDEM)
    )
    return math.inf if math.isinf(own) else own / min(theirs)


def goodput_ratio(climb: Iterable[Stage]) -> float | None:
    """Goodput at `OVERLOAD` over the best up to `PEAK` times the capacity. None where a side was not measured."""
    found = {one.factor: one.offered.window.goodput for one in climb}
    below = [goodput for factor, goodput in found.items() if factor <= PEAK]
    if OVERLOAD not in found or not below:
        return None
    return found[OVERLOAD] / max(below) if max(below) else 0.0


def read_record(file: Path) -> Record:
    """Raises OperatorError that names the file and the key."""
    try:
        return Record.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OperatorError(f"--check {file}: {error.strerror}", "check") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise OperatorError(f"--check {file}: {key + ': ' if key else ''}{first['msg']}", "check") from None


def comparable(plan: Plan, record: Record, file: Path) -> None:
    """Raises OperatorError where the plan measures nothing that is on record: such a check would pass by itself."""
    planned = {throughput_name(name) for name in plan.servers if name != TANDEM}
    if "same-rate" in plan.sections and planned:
        planned.add(P95)
    if "overload" in plan.sections:
        planned.add(GOODPUT)
    if not planned & set(record.ratios):
        raise OperatorError(f"--check {file}: this run measures none of: {', '.join(record.ratios)}", "check")


def hold(measured: Iterable[Ratio], record: Record) -> list[Held]:
    """The ratios that are both measured and on record."""
    return [Held(ratio=one, recorded=record.ratios[one.name]) for one in measured if one.name in record.ratios]
