"""What a dashboard is made of, without Grafana's words for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Query:
    """`legend` may name labels in double braces."""

    expr: str
    legend: str
    instant: bool = False


@dataclass(frozen=True)
class Panel:
    """`kind` is Grafana's; `unit` too. `least` and `most` are the ends of the axis, where they are fixed; below `usual`
    it goes where it must. `nothing` is shown where there is no value, `words` for values that stand for one.
    """

    title: str
    description: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    least: float | None = 0
    most: float | None = None
    usual: float | None = None
    nothing: str = ""
    words: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    limits: Sequence[tuple[float, str]] = ()
    legend_table: bool = False


@dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Variable:
    """Values of a label, of which none, one or several may be chosen."""

    name: str
    label: str
    query: str


@dataclass(frozen=True)
class Dashboard:
    name: str
    title: str
    description: str
    rows: Sequence[Row]
    variables: Sequence[Variable] = field(default=())
