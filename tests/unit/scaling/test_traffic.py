"""Simulated traffic against the decisions: enough replicas, back to none, and no flapping. docs/scaling.md has the
figures, and is held to them."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support.scaled_pool import Story, orders_at, run

from serve.scaling.demand import FULL, Place

PAGE = Path(__file__).parents[3] / "docs" / "scaling.md"
HOUR = 3600
COST_S = 5.0
"""Of an order, on one replica."""
ONE = [Place("p", "m", 64, 0, 8)]
"""With the settings' own target."""


def loads(of: Callable[[int], float], seconds: int) -> Mapping[int, list[tuple[int, float]]]:
    """Orders at so many replicas' work by second."""
    return orders_at({second: of(second) / COST_S for second in range(seconds)}, COST_S)


def square(half_s: int) -> Callable[[int], float]:
    return lambda second: 3.5 if second // half_s % 2 == 0 else 0.0


def bursts(every_s: int, number: int) -> Mapping[int, list[tuple[int, float]]]:
    return {60 + every_s * n: [(64, COST_S)] * 36 for n in range(number)}


TRACES: Mapping[str, Callable[[], Story]] = {
    "one burst of 180 s of work": lambda: run(ONE, bursts(1, 1), HOUR),
    "that burst every 2 min for an hour": lambda: run(ONE, bursts(120, 30), 2 * HOUR),
    "that burst every 15 min for 2 h": lambda: run(ONE, bursts(900, 8), 3 * HOUR),
    "up to 6 replicas' work and down in 2 h": lambda: run(
        ONE, loads(lambda second: 6 * (1 - abs(second / HOUR - 1)), 2 * HOUR), 3 * HOUR
    ),
    "3.5 replicas' work for 3 h": lambda: run(ONE, loads(lambda second: 3.5, 3 * HOUR), 4 * HOUR),
    "3.5, on and off by turns of 1 min, 2 h": lambda: run(ONE, loads(square(60), 2 * HOUR), 3 * HOUR),
    "3.5, on and off by turns of 4 min, 2 h": lambda: run(ONE, loads(square(240), 2 * HOUR), 3 * HOUR),
    "3.5, on and off by turns of 15 min, 2 h": lambda: run(ONE, loads(square(900), 2 * HOUR), 3 * HOUR),
    "a day within 8 h, 6 at its noon": lambda: run(
        ONE, loads(lambda second: 6 * max(0.0, -math.cos(2 * math.pi * second / (8 * HOUR))), 8 * HOUR), 9 * HOUR
    ),
}


@pytest.fixture(scope="module")
def stories() -> Mapping[str, Story]:
    return {name: trace() for name, trace in TRACES.items()}


def test_the_documentation_tells_what_the_traces_come_to(stories: Mapping[str, Story]) -> None:
    told = dict(
        re.findall(r"^\| ([^|]+) \| ([\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ s \| [\d.]+) \|$", PAGE.read_text(), re.M)
    )
    assert told == {name: " | ".join(row(story)) for name, story in stories.items()}


def row(story: Story) -> tuple[str, ...]:
    pool = story.pools["p"]
    hours = f"{pool.replica_s / HOUR:.1f}"
    return str(pool.most), str(pool.starts), str(pool.turns), f"{story.p95_wait()} s", hours


def test_it_turns_no_more_often_than_the_load_rests_longer_than_idle(stories: Mapping[str, Story]) -> None:
    """A turn is a pool that grew and shrinks, or the other way round. Up and down are two."""
    turns = {name: story.pools["p"].turns for name, story in stories.items()}
    assert turns["one burst of 180 s of work"] == 2
    assert turns["that burst every 2 min for an hour"] == 2
    assert turns["that burst every 15 min for 2 h"] == 2 * 8
    assert turns["up to 6 replicas' work and down in 2 h"] == 2
    assert turns["3.5 replicas' work for 3 h"] == 2
    assert turns["a day within 8 h, 6 at its noon"] == 2
    assert turns["3.5, on and off by turns of 15 min, 2 h"] == 2 * 4


def test_a_steady_load_has_as_many_as_it_needs(stories: Mapping[str, Story]) -> None:
    pool = stories["3.5 replicas' work for 3 h"].pools["p"]
    assert pool.most <= math.ceil(3.5 / FULL) + 1
    assert pool.starts == pool.most, "none was stopped and started again"


def test_without_what_arrives_a_steady_load_would_flap(monkeypatch: pytest.MonkeyPatch) -> None:
    import support.scaled_pool

    monkeypatch.setattr(support.scaled_pool, "carried", lambda places, bands: {"p": 0})
    pool = run(ONE, loads(lambda second: 3.5, 2 * HOUR), 3 * HOUR).pools["p"]
    assert pool.turns > 4


def test_everything_is_drawn_and_all_go_to_sleep(stories: Mapping[str, Story]) -> None:
    for name, story in stories.items():
        assert story.pools["p"].ordered == 0, name
        assert story.p95_wait() < 60, name


def test_a_cold_start_orders_nobody_twice() -> None:
    """Ten minutes until the first replica is there: the work that waits is all that is ordered for."""
    story = run(ONE, {0: [(64, COST_S)] * 12}, HOUR, start_s=600)
    assert (story.pools["p"].starts, story.pools["p"].turns) == (2, 2)


def test_small_work_overflows_to_larger_cards_and_leaves_them_again() -> None:
    places = [Place("small", "m", 64, 0, 2), Place("large", "m", 256, 0, 4)]
    story = run(places, {10: [(64, COST_S)] * 40, 1500: [(64, COST_S)], 3000: [(256, COST_S)]}, 2 * HOUR)
    small, large = story.pools["small"], story.pools["large"]
    assert (small.starts, small.turns) == (2 + 1, 4)
    assert (large.starts, large.turns) == (4 + 1, 4)
    assert len(story.waits) == 42
