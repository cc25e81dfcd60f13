"""Which units a rule for weights asks for beside the text's own."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from subprocess import run

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.domain.text import EncodeUnit, Weighting
from serve.errors import InvalidRequest
from serve.prompts.wanted import MAX_FRAGMENTS, NO_WORDS, WeightedRow, runs, wanted

EMPTY = EncodeUnit("clip", (1, 2, 0, 0, 0, 0, 0, 0), "skip:1", "tenant")
LENGTH = len(EMPTY.token_ids)


def row(*weights: float, first: int = 10, fragments: Sequence[int] = ()) -> WeightedRow:
    """Begin, a token for each of `weights`, end and padding; `fragments` are the words' numbers."""
    spare = LENGTH - len(weights) - 1
    ids = (1, *range(first, first + len(weights)), 2, *(0,) * (spare - 1))
    numbers = (NO_WORDS, *fragments, *(NO_WORDS,) * spare) if fragments else ()
    weighed = (1.0, *weights, *(1.0,) * spare) if any(weight != 1.0 for weight in weights) else None
    return WeightedRow(replace(EMPTY, token_ids=ids), weighed, numbers)


@pytest.mark.parametrize("rule", [Weighting.A1111, Weighting.MULTIPLY])
def test_a_rule_that_reads_no_other_row_asks_for_none(rule: Weighting) -> None:
    rows = row(1.0, 0.5, 1.5), row(2.0, first=20)
    plan = wanted(rule, rows, EMPTY)
    assert plan.units == tuple(each.unit for each in rows)
    assert (plan.empty, plan.fragments, plan.extra) == (None, (), ())


@pytest.mark.parametrize("rule", Weighting)
def test_without_weights_no_rule_asks_for_more(rule: Weighting) -> None:
    rows = row(1.0, 1.0), row(1.0, first=20)
    assert wanted(rule, rows, EMPTY).units == tuple(each.unit for each in rows)


def test_compels_rule_asks_for_the_empty_text_and_for_the_row_without_each_weighted_fragment() -> None:
    text = row(1.0, 0.5, 0.5, 1.5)
    plan = wanted(Weighting.COMPEL, [text], EMPTY)
    without = [replace(text.unit, hidden=hidden) for hidden in ((2, 3), (4,))]
    assert plan.empty == EMPTY
    assert [(each.weight, each.without) for each in plan.fragments] == [(0.5, (without[0],)), (1.5, (without[1],))]
    assert plan.extra == (EMPTY, *without)
    assert plan.units == (text.unit, EMPTY, *without)


WEIGHTS = [-2.0, 0.0, 0.4, 0.8, 0.999, 1.0, 1.1, 1.5, 3.0, 1000.0]


def test_a_sweep_of_a_weight_asks_for_no_new_unit() -> None:
    first = set(wanted(Weighting.COMPEL, [row(1.0, 0.7, 1.0)], EMPTY).units)
    swept = [wanted(Weighting.COMPEL, [row(1.0, weight, 1.0)], EMPTY).units for weight in WEIGHTS]
    assert all(set(units) <= first for units in swept)
    assert len(first) == 3
    assert [len(units) for units in swept] == [1 if weight == 1.0 else 3 for weight in WEIGHTS]


def test_words_that_go_on_in_the_next_row_are_one_fragment() -> None:
    numbers = runs([1.0, 0.5, 0.5, 0.5, 1.0, 0.5])
    assert numbers == (0, 1, 1, 1, 2, 3)
    rows = row(1.0, 0.5, fragments=numbers[:2]), row(0.5, 0.5, 1.0, 0.5, first=20, fragments=numbers[2:])
    plan = wanted(Weighting.COMPEL, rows, EMPTY)
    places = [tuple(unit and unit.hidden for unit in each.without) for each in plan.fragments]
    assert places == [((2,), (1, 2)), (None, (4,))]


def test_words_that_overlapping_rows_share_are_one_fragment() -> None:
    rows = row(1.0, 1.0, 0.5, fragments=(0, 0, 1)), row(1.0, 0.5, 1.0, first=11, fragments=(0, 1, 2))
    (fragment,) = wanted(Weighting.COMPEL, rows, EMPTY).fragments
    assert [unit and unit.hidden for unit in fragment.without] == [(3,), (2,)]


def test_rows_that_are_not_numbered_have_their_own_fragments() -> None:
    rows = row(1.0, 0.5), row(0.5, 1.0, 0.5, first=20), row(1.0, first=30)
    fragments = wanted(Weighting.COMPEL, rows, EMPTY).fragments
    places = [tuple(unit and unit.hidden for unit in each.without) for each in fragments]
    assert places == [((2,), None, None), (None, (1,), None), (None, (3,), None)]


@given(st.lists(st.sampled_from([0.5, 1.0, 1.5]), max_size=30))
def test_runs_are_neighbours_of_one_weight(weights: list[float]) -> None:
    numbers = runs(weights)
    assert len(numbers) == len(weights)
    for at in range(1, len(weights)):
        assert numbers[at] - numbers[at - 1] == (weights[at] != weights[at - 1])


@given(st.lists(st.sampled_from([0.5, 1.0, 1.5]), min_size=1, max_size=LENGTH - 2))
def test_every_weighted_token_is_hidden_once_and_no_other(weights: list[float]) -> None:
    plan = wanted(Weighting.COMPEL, [row(*weights)], EMPTY)
    hidden = [(at, each.weight) for each in plan.fragments for unit in each.without if unit for at in unit.hidden]
    assert sorted(hidden) == [(at, weight) for at, weight in enumerate(weights, 1) if weight != 1.0]


def test_a_text_that_ends_its_row_stands_against_a_longer_empty_one() -> None:
    short = WeightedRow(replace(EMPTY, token_ids=(10, 11, 2)), (1.0, 0.5, 1.0))
    assert wanted(Weighting.COMPEL, [short], EMPTY).empty == EMPTY


def test_more_fragments_than_it_takes_are_refused_by_name() -> None:
    def text(count: int) -> list[WeightedRow]:
        return [row(0.5, 1.0, 0.5, first=20 + 10 * index) for index in range(count // 2)]

    assert len(wanted(Weighting.COMPEL, text(MAX_FRAGMENTS), EMPTY).fragments) == MAX_FRAGMENTS
    with pytest.raises(InvalidRequest, match="negative_prompt: 34 groups of words") as raised:
        wanted(Weighting.COMPEL, text(MAX_FRAGMENTS + 2), EMPTY, "negative_prompt")
    assert raised.value.param == "negative_prompt"
    assert len(wanted(Weighting.A1111, text(MAX_FRAGMENTS + 2), EMPTY).units) == MAX_FRAGMENTS // 2 + 1


@pytest.mark.parametrize(
    "broken",
    [
        replace(row(0.5), weights=(1.0, 0.5)),
        replace(row(0.5), fragments=(0, 0)),
        replace(row(0.5), fragments=(NO_WORDS,) * LENGTH),
        replace(row(0.5, 0.6), fragments=(0,) * LENGTH),
        replace(row(0.5), unit=replace(EMPTY, token_ids=(*EMPTY.token_ids, 0)), weights=(0.5,) * (LENGTH + 1)),
    ],
    ids=["weights", "numbers", "no-words", "two-weights", "longer-than-empty"],
)
def test_rows_that_contradict_themselves_are_an_error(broken: WeightedRow) -> None:
    with pytest.raises(ValueError):
        wanted(Weighting.COMPEL, [broken], EMPTY)


def test_planning_needs_no_torch() -> None:
    code = "import sys, serve.prompts.wanted; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0
