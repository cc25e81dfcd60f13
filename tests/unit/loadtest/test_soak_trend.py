"""Leaks and no leaks, made up: what a slope and its interval say of them."""

import numpy as np
import pytest

from loadtest.bench.soak_trend import PER, Verdict, second_half, student, trend

KIB = 1024.0
LIMIT = 64 * KIB
IMAGES = np.linspace(5000, 10_000, 120)
"""The second half of a soak, a look every forty images."""


def memory(leak_kib: float, seed: int = 0, noise_kib: float = 300.0, carried: float = 0.8) -> list[float]:
    """A process that grows by `leak_kib` per thousand images, and whose allocator keeps for a while what it took."""
    rng = np.random.default_rng(seed)
    away = 0.0
    seen = []
    for images in IMAGES:
        away = carried * away + float(rng.normal(0, noise_kib * (1 - carried**2) ** 0.5))
        seen.append((500_000 + leak_kib * float(images) / PER + away) * KIB)
    return seen


def test_a_leak_is_found_with_its_size() -> None:
    found = trend(IMAGES.tolist(), memory(1000))
    assert found is not None
    assert found.low < 1000 * KIB < found.high
    assert found.slope == pytest.approx(1000 * KIB, rel=0.2)
    assert found.verdict(LIMIT) is Verdict.GROWS
    assert found.last - found.first == pytest.approx(4750 * KIB, rel=0.2)


def test_what_only_goes_up_and_down_is_flat() -> None:
    verdicts = [found.verdict(LIMIT) for seed in range(100) if (found := trend(IMAGES.tolist(), memory(0, seed)))]
    assert len(verdicts) == 100
    assert verdicts.count(Verdict.FLAT) >= 90
    assert verdicts.count(Verdict.GROWS) <= 5  # half of the 5 % that are wrong by design err below 0, which is flat


def test_noise_that_a_leak_could_hide_in_is_no_flatness() -> None:
    verdicts = [
        found.verdict(LIMIT) for seed in range(100) if (found := trend(IMAGES.tolist(), memory(500, seed, 4000.0)))
    ]
    assert verdicts.count(Verdict.DOUBT) > 50


def test_the_interval_holds_the_truth_as_often_as_it_says_though_looks_are_alike() -> None:
    """Without stretches, neighbours that carry 80 % of their noise on would make it far too narrow."""
    found = [trend(IMAGES.tolist(), memory(200, seed)) for seed in range(200)]
    assert sum(one is not None and one.low <= 200 * KIB <= one.high for one in found) >= 0.88 * 200


def test_little_growth_is_flat_however_sure_it_is_and_so_is_shrinking() -> None:
    slow, shrinks = (trend(IMAGES.tolist(), memory(kib, noise_kib=1.0)) for kib in (60.0, -5000.0))
    assert slow is not None
    assert slow.low > 0
    assert slow.verdict(LIMIT) is Verdict.FLAT
    assert slow.verdict(40 * KIB) is Verdict.GROWS
    assert shrinks is not None
    assert shrinks.high < 0
    assert shrinks.verdict(LIMIT) is Verdict.FLAT


def test_what_never_changes_has_no_slope() -> None:
    found = trend([1.0, 2.0, 3.0, 4.0], [7.0] * 4)
    assert found is not None
    assert (found.slope, found.low, found.high, found.verdict(1.0)) == (0.0, 0.0, 0.0, Verdict.FLAT)


def test_too_little_tells_nothing() -> None:
    assert trend([1, 2, 3], [1, 2, 3]) is None
    assert trend([5, 5, 5, 5], [1, 2, 3, 4]) is None


def test_the_second_half_is_of_the_images_not_of_the_looks() -> None:
    assert second_half([0, 10, 20, 30, 90, 95, 100]) == 4
    assert second_half([]) == 0


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (8, 2.306), (18, 2.101), (1000, 1.962)]
)
def test_students_t_is_that_of_the_tables(freedom: int, t: float) -> None:
    assert student(0.95, freedom) == pytest.approx(t, rel=0.01)
