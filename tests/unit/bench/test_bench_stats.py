from itertools import pairwise

import pytest

from serve.bench.stats import Percentiles, Spread, poisson_arrivals


def test_arrivals_are_the_same_for_a_seed_and_others_for_another() -> None:
    assert poisson_arrivals(50, 10, seed=3) == poisson_arrivals(50, 10, seed=3)
    assert poisson_arrivals(50, 10, seed=3) != poisson_arrivals(50, 10, seed=4)


def test_arrivals_have_the_rate_in_order_and_within_the_time() -> None:
    arrivals = poisson_arrivals(200, 30, seed=0)
    assert len(arrivals) == 6000
    assert arrivals == sorted(arrivals)
    assert arrivals[0] >= 0
    assert arrivals[-1] < 30


def test_gaps_between_arrivals_are_those_of_a_poisson_process() -> None:
    """Exponential gaps: their standard deviation is their mean, and 1/e of them are longer than it."""
    arrivals = poisson_arrivals(1000, 20, seed=1)
    gaps = [after - before for before, after in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1e-3, rel=0.01)
    assert deviation == pytest.approx(mean, rel=0.03)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.01)


def test_a_short_run_has_one_arrival() -> None:
    assert len(poisson_arrivals(0.01, 1, seed=0)) == 1


@pytest.mark.parametrize(("rate", "seconds"), [(0, 1), (1, 0), (-1, 1)])
def test_no_arrivals_without_rate_or_time(rate: float, seconds: float) -> None:
    with pytest.raises(ValueError):
        poisson_arrivals(rate, seconds, seed=0)


def test_percentiles_of_a_known_sample() -> None:
    of = Percentiles.of([value / 100 for value in range(101)])
    assert (of.count, of.p50, of.p95, of.p99, of.worst) == (101, 0.5, 0.95, 0.99, 1.0)


def test_percentiles_do_not_depend_on_the_order() -> None:
    assert Percentiles.of([3.0, 1.0, 2.0]) == Percentiles.of([1.0, 2.0, 3.0])


def test_a_spread_is_the_median_and_the_extremes() -> None:
    assert Spread.of([4.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=4.0, count=3)


@pytest.mark.parametrize("kind", [Percentiles, Spread])
def test_nothing_has_no_statistics(kind: type[Percentiles] | type[Spread]) -> None:
    with pytest.raises(ValueError):
        kind.of([])
