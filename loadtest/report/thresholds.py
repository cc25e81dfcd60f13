"""What a run must reach: named figures with bounds, as a workload writes them, and whether they were met."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from serve.errors import OperatorError

if TYPE_CHECKING:
    from loadtest.report.results import Summary
    from loadtest.tail import Tail
    from serve.bench.stats import Percentiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """`unit` is printed behind the number: `s`, `/s`, `%` (of a ratio), or nothing. `of` gives None where the run has
    no such figure, and infinity for a percentile among requests that never got a result."""

    what: str
    unit: str
    of: Callable[[Summary], float | None]


def _at(of: Tail | Percentiles | None, which: Literal["p50", "p95", "p99", "worst"]) -> float | None:
    if of is None:
        return None
    value: float | None = getattr(of, which)
    return math.inf if value is None else value


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


_WHOSE = "from the intended send time; what was not refused and never came is endless"

FIGURES: Mapping[str, Figure] = {
    "offered_per_s": Figure(what="Requests that were due, a second.", unit="/s", of=lambda s: s.offered_per_s),
    "throughput_per_s": Figure(what="Pictures finished, a second.", unit="/s", of=lambda s: s.throughput_per_s),
    "goodput_per_s": Figure(
        what="Pictures finished within the deadline, a second.", unit="/s", of=lambda s: s.goodput_per_s
    ),
    "goodput_ratio": Figure(
        what="Share of the requests that were finished within the deadline.",
        unit="%",
        of=lambda s: _share(s.good, s.requests),
    ),
    "p50_s": Figure(what=f"Median latency, {_WHOSE}.", unit="s", of=lambda s: _at(s.latency, "p50")),
    "p95_s": Figure(
        what=f"95th percentile of latency, {_WHOSE}.",
        unit="s",
        of=lambda s: _at(s.latency, "p95"),
    ),
    "p99_s": Figure(
        what=f"99th percentile of latency, {_WHOSE}.",
        unit="s",
        of=lambda s: _at(s.latency, "p99"),
    ),
    "worst_s": Figure(what=f"Longest latency, {_WHOSE}.", unit="s", of=lambda s: _at(s.latency, "worst")),
    "refused_ratio": Figure(
        what="Share of the requests that were told to come again.",
        unit="%",
        of=lambda s: _share(s.refused, s.requests),
    ),
    "refused_p50_s": Figure(
        what="Median time to a refusal, from the intended send time.",
        unit="s",
        of=lambda s: _at(s.refusals, "p50"),
    ),
    "refused_p99_s": Figure(
        what="99th percentile of the time to a refusal, from the intended send time.",
        unit="s",
        of=lambda s: _at(s.refusals, "p99"),
    ),
    "failed_ratio": Figure(
        what="Share of the requests that failed, were too late, were invalid, or whose connection broke.",
        unit="%",
        of=lambda s: _share(s.failed, s.requests),
    ),
    "send_lag_p99_s": Figure(
        what="99th percentile of how late the client sent: its own fault, in every latency.",
        unit="s",
        of=lambda s: _at(s.send_lag, "p99"),
    ),
    "hit_ratio": Figure(
        what="Share of the text units that came from a cache, empty texts left out.",
        unit="%",
        of=lambda s: s.hit_ratio(),
    ),
    "hit_ratio_positive": Figure(
        what="Share of the prompts' text units that came from a cache.", unit="%", of=lambda s: s.hit_ratio("positive")
    ),
    "hit_ratio_negative": Figure(
        what="Share of the negative prompts' text units that came from a cache.",
        unit="%",
        of=lambda s: s.hit_ratio("negative"),
    ),
    "forwards_per_job": Figure(
        what="Rows of text encoded for each job that ended.", unit="", of=lambda s: s.encoded_rows_per_job
    ),
    "mean_batch": Figure(what="Images that shared a denoising step, mean.", unit="", of=lambda s: s.mean_batch),
    "queue_age_max_s": Figure(what="Longest that a job was seen to wait.", unit="s", of=lambda s: s.queue_age_max_s),
    "explained_ratio": Figure(
        what="Share of the jobs' time that their stages explain, each job's at most whole.",
        unit="%",
        of=lambda s: s.explained_ratio,
    ),
}
"""Every figure that a threshold may name."""


class Bound(BaseModel):
    """What a figure must not pass, in the figure's unit; ratios go from 0 to 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at_most: float | None = Field(None, allow_inf_nan=False, description="The figure must not be above this.")
    at_least: float | None = Field(None, allow_inf_nan=False, description="The figure must not be below this.")

    @model_validator(mode="after")
    def _one_at_least(self) -> Self:
        if self.at_most is None and self.at_least is None:
            raise ValueError("write at_most, at_least, or both")
        return self


def unknown(names: Mapping[str, object]) -> str:
    """One line about names that no figure has; empty where there is none."""
    strange = [name for name in names if name not in FIGURES]
    return f"no figure is called {', '.join(strange)}; there are {', '.join(FIGURES)}" if strange else ""


def _known(bounds: dict[str, Bound]) -> dict[str, Bound]:
    if told := unknown(bounds):
        raise ValueError(told)
    return bounds


Thresholds = Annotated[dict[str, Bound], AfterValidator(_known)]
"""Bounds by the figure's name: the type of `thresholds` in a workload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One bound, and what the run came to: `measured` is as `Figure.of` has it. Where that is None, the bound is not
    met."""

    name: str
    what: str
    unit: str
    rule: str
    bound: float
    measured: float | None

    @property
    def met(self) -> bool:
        if self.measured is None:
            return False
        return self.measured <= self.bound if self.rule == "at_most" else self.measured >= self.bound


def check(summary: Summary, thresholds: Mapping[str, Bound]) -> list[Verdict]:
    """A verdict for each bound, in the workload's order. Raises OperatorError for a figure that does not exist."""
    if told := unknown(thresholds):
        raise OperatorError(f"thresholds: {told}", "thresholds")
    return [
        Verdict(
            name=name,
            what=FIGURES[name].what,
            unit=FIGURES[name].unit,
            rule=rule,
            bound=bound,
            measured=FIGURES[name].of(summary),
        )
        for name, limits in thresholds.items()
        for rule, bound in (("at_least", limits.at_least), ("at_most", limits.at_most))
        if bound is not None
    ]


def finite(value: float | None) -> float | None:
    """As JSON has a figure, which knows no infinity."""
    return None if value is None or math.isinf(value) else value


def shown(value: float | None, unit: str) -> str:
    """A figure for people: `41.2 %`, `412 ms`, `1.25 s`, `12.3 /s`; `no data` of None, `never` of infinity. Numbers of
    the same size have the same digits."""
    if value is None:
        return "no data"
    if math.isinf(value):
        return "never"
    if unit == "%":
        return f"{100 * value:.1f} %"
    if unit == "s":
        return f"{1e3 * value:.0f} ms" if abs(value) < 1 else f"{value:.{2 if abs(value) < 10 else 1}f} s"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 100 else 0
    return f"{value:,.{digits}f} {unit}".rstrip()
