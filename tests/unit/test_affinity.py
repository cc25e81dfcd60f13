"""Which replica a row of text is at home at."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from deployments.affinity import rank

ROWS = [(49406, number, *[49407] * 75) for number in range(3000)]
IDLE = {"one": 0, "two": 0, "three": 0}


def test_rows_spread_evenly() -> None:
    homes = Counter(rank(row, IDLE)[0] for row in ROWS)
    assert all(abs(count - 1000) < 120 for count in homes.values())


def test_a_replica_that_goes_takes_only_its_own_rows_along() -> None:
    for row in ROWS[:300]:
        before = rank(row, IDLE)
        after = rank(row, {"one": 0, "three": 0})
        assert after == [name for name in before if name != "two"]


def test_who_has_too_much_is_asked_last() -> None:
    row = ROWS[0]
    home, second, third = rank(row, IDLE)
    assert rank(row, IDLE | {home: 3}) == [home, second, third], "a little more than the others is no reason"
    assert rank(row, IDLE | {home: 30}) == [second, third, home]


@given(st.lists(st.integers(0, 49407), max_size=80), st.dictionaries(st.text("abc", min_size=1), st.integers(0, 300)))
def test_everybody_is_ranked_once_and_somebody_is_below_the_bound(ids: list[int], queues: dict[str, int]) -> None:
    ranked = rank(ids, queues)
    assert sorted(ranked) == sorted(queues)
    if ranked:
        assert queues[ranked[0]] <= 4 + 1.25 * sum(queues.values()) / len(queues)
