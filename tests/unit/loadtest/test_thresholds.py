"""Thresholds as a workload writes them, and the verdicts on a run."""

import math

import pytest
from pydantic import TypeAdapter, ValidationError
from support.load_results import busy, result, sample

from loadtest.report.results import summary
from loadtest.report.thresholds import FIGURES, Bound, Thresholds, check, shown
from serve.errors import OperatorError


def test_a_bound_is_met_up_to_itself() -> None:
    told = summary(result(*[sample(n, ended_s=2.0) for n in range(10)], duration_s=10.0, deadline_s=2.0))
    bounds = {
        "goodput_per_s": Bound(at_least=1.0),
        "p95_s": Bound(at_most=2.0),
        "p99_s": Bound(at_most=1.999),
        "throughput_per_s": Bound(at_least=0.5, at_most=0.9),
    }
    verdicts = check(told, bounds)
    assert [(each.name, each.rule, each.bound, each.measured, each.met) for each in verdicts] == [
        ("goodput_per_s", "at_least", 1.0, 1.0, True),
        ("p95_s", "at_most", 2.0, 2.0, True),
        ("p99_s", "at_most", 1.999, 2.0, False),
        ("throughput_per_s", "at_least", 0.5, 1.0, True),
        ("throughput_per_s", "at_most", 0.9, 1.0, False),
    ]


def test_a_figure_that_the_run_has_not_meets_no_bound() -> None:
    (verdict,) = check(summary(result(sample())), {"hit_ratio": Bound(at_least=0.0)})
    assert (verdict.measured, verdict.met) == (None, False)


def test_an_unknown_figure_is_one_line_that_lists_those_that_there_are() -> None:
    with pytest.raises(OperatorError) as refused:
        check(summary(result(sample())), {"p95_ms": Bound(at_most=1)})
    assert refused.value.message.startswith("thresholds: no figure is called p95_ms; there are offered_per_s, ")
    assert all(name in refused.value.message for name in FIGURES)
    with pytest.raises(ValidationError, match="no figure is called p95_ms; there are"):
        TypeAdapter(Thresholds).validate_python({"p95_ms": {"at_most": 1}})


@pytest.mark.parametrize("wrong", [{}, {"at_most": "soon"}, {"at_most": float("nan")}, {"below": 1}])
def test_a_bound_says_one_thing_at_least_and_nothing_else(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Thresholds).validate_python({"p95_s": wrong})


def test_every_figure_is_there_for_a_run_that_has_everything() -> None:
    told = summary(busy(60, 60.0))
    assert [name for name, each in FIGURES.items() if each.of(told) is None] == []


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0.412, "s", "412 ms"),
        (1.2345, "s", "1.23 s"),
        (12.34, "s", "12.3 s"),
        (0.9912, "%", "99.1 %"),
        (0.5, "/s", "0.500 /s"),
        (1234.5, "/s", "1,234 /s"),
        (2.5, "", "2.50"),
        (None, "s", "no data"),
        (math.inf, "s", "never"),
    ],
)
def test_figures_for_people(value: float | None, unit: str, words: str) -> None:
    assert shown(value, unit) == words
