import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.domain.text import Syntax
from serve.errors import InvalidRequest
from serve.prompts.ast import Blend, Entry, Part, Prompt, Scheduled, Text, Weighted, When
from serve.prompts.parse import parse
from serve.prompts.structured import blended, scheduled, sums
from serve.prompts.written import written


def text(written: str) -> Prompt:
    return (Text(written),)


def test_pieces_are_a_blend_that_is_normalized() -> None:
    prompt = blended([{"text": "a", "weight": 3}, {"text": "(b:2)"}])
    assert prompt == Blend((Part(text("a"), 3.0), Part((Weighted((Text("b"),), 2.0),))))
    assert prompt == parse('("a", "(b:2)").blend(3, 1)')
    assert sums(prompt) == (4.0,)


def test_one_piece_is_the_prompt_itself() -> None:
    assert blended([{"text": "a"}]) == text("a")
    assert sums(blended([{"text": "a", "weight": 0.3}])) == (0.3,)  # read whole, and told


def test_pieces_are_read_in_the_requests_syntax() -> None:
    plain = blended([{"text": "(a)"}, {"text": "b"}], syntax=Syntax.PLAIN)
    assert plain == Blend((Part(text("(a)")), Part(text("b"))))
    assert blended([{"text": "a++"}], syntax=Syntax.COMPEL) == (Weighted((Text("a"),), steps=2),)


def test_sums_are_those_that_are_not_1() -> None:
    assert sums(parse('("a", "b").blend(0.7, 0.3)')) == ()
    assert sums(parse('("a", "b").blend(2, 3, no_normalize)')) == ()
    inner = r'("(\"a\", \"b\").blend(2, 2)", "c").{}'
    assert sums(parse(inner.format("blend(0.5, 0.25)"))) == (0.75, 4.0)
    assert sums(parse(inner.format("schedule(1-2)"))) == (4.0,)
    assert sums(parse('a AND ("a", "b").blend(1, 1)')) == (2.0,)


def test_entries_are_a_schedule_over_the_base() -> None:
    entries: list[dict[str, Any]] = [
        {"from": 0, "to": 5, "prompt": "a"},
        {"from": 5, "to": 0.5, "prompt": [{"text": "b"}, {"text": "c"}], "ramp": True},
        {"from": 0.75, "prompt": "d", "ramp": False},
    ]
    prompt = scheduled(text("base"), entries, 20)
    blend = Blend((Part(text("b")), Part(text("c"))))
    half, three_quarters, end = (When(share, share=True) for share in (0.5, 0.75, 1.0))
    assert prompt == Scheduled(
        text("base"),
        (
            Entry(When(0.0, share=True), When(5.0), text("a")),
            Entry(When(5.0), half, blend, ramp=True),
            Entry(three_quarters, end, text("d")),
        ),
    )
    assert parse(written(prompt)) == prompt


@pytest.mark.parametrize(
    ("pieces", "param"),
    [
        ([], "prompt"),
        ([{"text": "a"}] * 65, "prompt"),
        ([{"text": "a", "weight": 1}, {"text": "b", "weight": -1}], "prompt"),
        ([{"text": "a", "weight": 0}], "prompt"),
        ([{"text": "a"}, {"text": "b", "weight": 1e9}], "prompt.1.weight"),
        ([{"text": "a", "weight": float("nan")}], "prompt.0.weight"),
        ([{"text": "a", "weight": float("inf")}], "prompt.0.weight"),
        ([{"text": "a", "weight": True}], "prompt.0.weight"),
        ([{"text": "a", "weight": "1"}], "prompt.0.weight"),
        ([{"text": "a"}, {"text": "(b:1e9)"}], "prompt.1.text"),
        ([{"text": "a AND b"}], "prompt.0.text"),
        ([{"text": 3}], "prompt.0.text"),
        ([{"weight": 1}], "prompt.0.text"),
        ([{"text": "a"}, "b"], "prompt.1"),
        ([{"text": "a", "wieght": 1}], "prompt.0"),
    ],
)
def test_bad_pieces_are_refused_by_name(pieces: Any, param: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{param}: ") as raised:
        blended(pieces)
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("entries", "param"),
    [
        ([], "schedule"),
        ([{"from": 5, "to": 60}], "schedule.0.to"),
        ([{"from": 51}], "schedule.0.from"),
        ([{"from": 50}], "schedule.0.to"),
        ([{"from": 5, "to": 5}], "schedule.0.to"),
        ([{"from": 9, "to": 5}], "schedule.0.to"),
        ([{"from": 0.51, "to": 0.515}], "schedule.0.to"),
        ([{"from": 1.5}], "schedule.0.from"),
        ([{"from": 0.5, "to": 20.0}], "schedule.0.to"),
        ([{"from": -1}], "schedule.0.from"),
        ([{"from": float("nan")}], "schedule.0.from"),
        ([{"from": True}], "schedule.0.from"),
        ([{"from": "5"}], "schedule.0.from"),
        ([{"to": 5}], "schedule.0.from"),
        ([{"from": 0, "to": 10}, {"from": 9, "to": 20}], "schedule.1.from"),
        ([{"from": 0, "to": 0.5}, {"from": 20}], "schedule.1.from"),
        ([{"from": 20, "to": 30}, {"from": 5, "to": 10}], "schedule.1.from"),
        ([{"from": 0, "to": 0.519}, {"from": 0.515}], "schedule.1.from"),
        ([{"from": 0, "prompt": 3}], "schedule.0.prompt"),
        ([{"from": 0, "prompt": None}], "schedule.0.prompt"),
        ([{"from": 0, "prompt": "(a:1e9)"}], "schedule.0.prompt"),
        ([{"from": 0, "prompt": [{"text": "a"}, {"text": "(a:1e9)"}]}], "schedule.0.prompt.1.text"),
        ([{"from": 0, "ramp": 1}], "schedule.0.ramp"),
        ([{"from": 0, "until": 1}], "schedule.0"),
    ],
)
def test_bad_entries_are_refused_by_name(entries: Any, param: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{param}: ") as raised:
        scheduled(text("base"), [{"prompt": "a", **entry} for entry in entries], 50)
    assert raised.value.param == param


def test_a_composition_is_not_scheduled() -> None:
    with pytest.raises(InvalidRequest, match="composition"):
        scheduled(parse("a AND b"), [{"from": 0, "prompt": "a"}], 50)


def test_what_could_not_be_written_is_too_deep() -> None:
    deep = "a"
    for _ in range(4):
        deep = written(blended([{"text": deep}, {"text": "b"}]))
    with pytest.raises(InvalidRequest, match="inside one another"):
        blended([{"text": deep}, {"text": "b"}])
    with pytest.raises(InvalidRequest, match="inside one another"):
        scheduled(parse(deep), [{"from": 1, "prompt": "b"}], 50)


MOMENTS = st.integers(-1, 12) | st.floats(-0.1, 1.1)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"from": MOMENTS, "to": MOMENTS, "prompt": st.just("b")}), min_size=1, max_size=3),
    st.integers(1, 10),
)
def test_whatever_is_taken_rises_step_by_step_and_can_be_written(entries: list[dict[str, Any]], steps: int) -> None:
    prompt = None
    with contextlib.suppress(InvalidRequest):
        prompt = scheduled(text("a"), entries, steps)
    if prompt is None:
        return
    moments = [moment.step(steps) for entry in prompt.entries for moment in (entry.begin, entry.end)]
    assert moments == sorted(moments)
    assert all(0 <= moment <= steps for moment in moments)
    assert all(begin < end for begin, end in zip(moments[::2], moments[1::2], strict=True))
    assert parse(written(prompt)) == prompt
