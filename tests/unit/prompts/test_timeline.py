from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.domain.conditioning import Mix
from serve.domain.text import Syntax
from serve.errors import InvalidRequest
from serve.prompts.ast import (
    Alternate,
    Blend,
    Break,
    Composition,
    Concept,
    Conjunction,
    Entry,
    Part,
    Prompt,
    Ramp,
    Scheduled,
    Switch,
    Text,
    Weighted,
    When,
    Words,
)
from serve.prompts.parse import parse
from serve.prompts.timeline import MAX_TEXTS, Flat, Span, Timeline, timeline

STEPS = 10


def said(flat: Flat) -> str:
    """The text with weights as A1111 writes them."""
    parts = []
    for each in flat:
        if isinstance(each, Break):
            parts.append("BREAK")
        else:
            parts.append(each.text if each.weight == 1.0 else f"({each.text}:{each.weight:g})")
    return "".join(parts)


def shares(line: Timeline, step: int, lane: int = 0) -> dict[str, float]:
    """What is read in a step, by text; of `.and()` the first place alone."""
    _, mix = lanes(line, step)[lane]
    return {said(line.texts[index]): share for share, index in mix if not line.slots[index]}


def lanes(line: Timeline, step: int) -> tuple[tuple[float, Mix], ...]:
    return next(now for first, now in reversed(line.phases) if first <= step)


def schedule(text: str, steps: int = STEPS) -> list[list[object]]:
    """As A1111 tells it: [number of the last step of a phase, text], of prompts that mix nothing."""
    line = timeline(parse(text), steps)
    ends = [first for first, _ in line.phases[1:]] + [steps]
    told = []
    for end, (first, _) in zip(ends, line.phases, strict=True):
        ((text, share),) = shares(line, first).items()
        assert share == 1.0
        told.append([end, text])
    return told


# The doctests of `get_learned_conditioning_prompt_schedules` in
# https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/master/modules/prompt_parser.py, for 10 steps; its texts
# go on to be read for weights, so that they are compared as what they weigh.
PUBLISHED: list[tuple[str, list[list[object]]]] = [
    ("test", [[10, "test"]]),
    ("a [b:3]", [[3, "a "], [10, "a b"]]),
    ("a [b: 3]", [[3, "a "], [10, "a b"]]),
    ("a [[[b]]:2]", [[2, "a "], [10, "a [[b]]"]]),
    ("[(a:2):3]", [[3, ""], [10, "(a:2)"]]),
    ("a [b : c : 1] d", [[1, "a b  d"], [10, "a  c  d"]]),
    ("a[b:[c:d:2]:1]e", [[1, "abe"], [2, "ace"], [10, "ade"]]),
    ("a [unbalanced", [[10, "a [unbalanced"]]),
    ("a [b:.5] c", [[5, "a  c"], [10, "a b c"]]),
    ("a [{b|d{:.5] c", [[5, "a  c"], [10, "a {b|d{ c"]]),
    ("((a][:b:c [d:3]", [[3, "((a][:b:c "], [10, "((a][:b:c d"]]),
    ("[a|(b:1.1)]", [[step, "(b:1.1)" if step % 2 == 0 else "a"] for step in range(1, 11)]),
    ("[fe|]male", [[step, "male" if step % 2 == 0 else "female"] for step in range(1, 11)]),
    (
        "[fe|||]male",
        [[1, "female"], [4, "male"], [5, "female"], [8, "male"], [9, "female"], [10, "male"]],
    ),
]


def weighed(text: str) -> str:
    """One of A1111's texts as it is read for weights, told like our own."""
    ((_, told),) = schedule(text)
    return str(told)


@pytest.mark.parametrize(("text", "expected"), PUBLISHED, ids=[text for text, _ in PUBLISHED])
def test_schedules_are_a1111s_published_ones(text: str, expected: list[list[object]]) -> None:
    assert schedule(text) == [[end, weighed(str(told))] for end, told in expected]


def test_a_switch_at_step_five_reads_the_new_words_from_step_five_on() -> None:
    line = timeline((Switch((Text("a"),), (Text("b"),), When(5)),), STEPS)
    assert line.phases == ((0, ((1.0, ((1.0, 0),)),)), (5, ((1.0, ((1.0, 1),)),)))
    assert [said(flat) for flat in line.texts] == ["a", "b"]


def test_a_plain_prompt_is_one_text_and_one_phase() -> None:
    line = timeline((Text("a red circle"),), STEPS)
    assert line == Timeline(((Span("a red circle", 1.0),),), (0,), ((0, ((1.0, ((1.0, 0),)),)),))
    assert timeline((), STEPS).texts == ((),)


def test_steps_that_read_the_same_are_one_phase() -> None:
    same = timeline((Switch((Text("a"),), (Text("a"),), When(5)),), STEPS)
    assert same == timeline((Text("a"),), STEPS)
    turns = timeline((Alternate(((Text("a"),), (Text("b"),), (Text("b"),))),), STEPS)
    assert [first for first, _ in turns.phases] == [0, 1, 3, 4, 6, 7, 9]
    assert len(turns.texts) == 2


def test_a_ramp_goes_over_in_equal_parts() -> None:
    line = timeline((Text("x "), Ramp((Text("a"),), (Text("b"),), When(2), When(6))), STEPS)
    assert len(line.texts) == 2
    told = [shares(line, step) for step in range(STEPS)]
    assert told[:3] == [{"x a": 1.0}] * 3
    assert told[3:6] == [{"x a": 0.75, "x b": 0.25}, {"x a": 0.5, "x b": 0.5}, {"x a": 0.25, "x b": 0.75}]
    assert told[6:] == [{"x b": 1.0}] * 4


def test_a_ramp_of_no_steps_is_a_switch() -> None:
    ramp = timeline((Ramp((Text("a"),), (Text("b"),), When(4), When(4)),), STEPS)
    assert ramp == timeline((Switch((Text("a"),), (Text("b"),), When(4)),), STEPS)


def test_ramps_over_the_same_steps_go_together_and_others_multiply_out() -> None:
    def ramp(before: str, after: str, begin: int, end: int) -> Ramp:
        return Ramp((Text(before),), (Text(after),), When(begin), When(end))

    together = timeline((ramp("a", "b", 0, 4), ramp("c", "d", 0, 4)), STEPS)
    assert shares(together, 1) == {"ac": 0.75, "bd": 0.25}
    apart = timeline((ramp("a", "b", 0, 4), ramp("c", "d", 0, 8)), STEPS)
    assert shares(apart, 2) == pytest.approx({"ac": 0.375, "ad": 0.125, "bc": 0.375, "bd": 0.125})
    assert shares(apart, 6) == pytest.approx({"bc": 0.25, "bd": 0.75})


def test_weights_multiply_and_neighbours_of_one_weight_are_one_span() -> None:
    words: Words = (
        Text("a "),
        Weighted((Text("b"), Weighted((Text("c"),), steps=-1)), steps=1),
        Text("d"),
        Weighted((Text("e"), Weighted((Text("f"),), 0.5)), 1.5),
    )
    ((flat,), _, _) = _parts(timeline(words, STEPS))
    assert flat == (
        Span("a ", 1.0),
        Span("b", 1.1),
        Span("cd", 1.0),
        Span("e", 1.5),
        Span("f", 0.75),
    )


def _parts(line: Timeline) -> tuple[tuple[Flat, ...], tuple[int, ...], object]:
    return line.texts, line.slots, line.phases


def test_breaks_stand_between_words_alone() -> None:
    words: Words = (Break(), Text("a"), Break(), Break(), Concept("cat"), Text(" b"), Break())
    (flat,) = timeline(words, STEPS).texts
    assert flat == (Span("a", 1.0), Break(), Span("<cat>", 1.0, "cat"), Span(" b", 1.0))
    assert timeline((Break(),), STEPS).texts == ((),)


def test_blends_are_normalized_unless_they_say_otherwise() -> None:
    parts = (Part((Text("a"),), 3.0), Part((Text("b"),), 1.0))
    assert shares(timeline(Blend(parts), STEPS), 0) == {"a": 0.75, "b": 0.25}
    assert shares(timeline(Blend(parts, normalize=False), STEPS), 0) == {"a": 3.0, "b": 1.0}
    twice = Blend((Part((Text("a"),), 1.0), Part((Text("a"),), 1.0)))
    assert shares(timeline(twice, STEPS), 0) == {"a": 1.0}
    nothing = Blend((Part((Text("a"),), 1.0), Part((Text("b"),), -1.0)))
    with pytest.raises(InvalidRequest, match="prompt: the weights of a blend add up to nothing"):
        timeline(nothing, STEPS)


def test_a_blend_names_its_texts_whatever_their_shares() -> None:
    """Sweeping the shares asks for no other text."""
    texts = [timeline(Blend((Part((Text("a"),), w), Part((Text("b"),), 1 - w))), STEPS).texts for w in (0, 0.3, 1)]
    assert texts[0] == texts[1] == texts[2]


def test_a_blend_changes_with_its_parts() -> None:
    part = (Switch((Text("a"),), (Text("b"),), When(5)),)
    line = timeline(Blend((Part(part), Part((Text("c"),)))), STEPS)
    assert [first for first, _ in line.phases] == [0, 5]
    assert shares(line, 7) == {"b": 0.5, "c": 0.5}


def test_a_composition_has_a_lane_for_each_part() -> None:
    line = timeline(Composition((Part((Text("a"),)), Part((Text("b"),), -0.5))), STEPS)
    assert line.phases == ((0, ((1.0, ((1.0, 0),)), (-0.5, ((1.0, 1),)))),)
    with pytest.raises(InvalidRequest, match="AND can't be inside another construct"):
        timeline(
            Blend(
                (
                    Part(
                        Composition((Part((Text("a"),)), Part((Text("b"),)))),
                    ),
                )
            ),
            STEPS,
        )


def test_a_conjunction_puts_texts_below_one_another() -> None:
    line = timeline(Conjunction((Part((Text("a"),)), Part((Text("b"),)), Part((Text("a"),)))), STEPS)
    assert [(said(flat), slot) for flat, slot in zip(line.texts, line.slots, strict=True)] == [
        ("a", 0),
        ("b", 1),
        ("a", 2),
    ]
    assert line.phases == ((0, ((1.0, ((1.0, 0), (1.0, 1), (1.0, 2))),)),)


def test_the_weight_of_a_conjunctions_part_draws_it_from_the_empty_text() -> None:
    """As Compel: empty + w * (text - empty)."""
    line = timeline(Conjunction((Part((Text("a"),)), Part((Text("b"),), 0.25))), STEPS)
    ((_, mix),) = lanes(line, 0)
    assert {(said(line.texts[index]), line.slots[index]): share for share, index in mix} == {
        ("a", 0): 1.0,
        ("b", 1): 0.25,
        ("", 1): 0.75,
    }


def test_below_a_shorter_part_of_a_blend_stands_the_empty_text() -> None:
    inner = Conjunction((Part((Text("a"),)), Part((Text("b"),))))
    line = timeline(Blend((Part(inner), Part((Text("c"),)))), STEPS)
    ((_, mix),) = lanes(line, 0)
    assert {(said(line.texts[index]), line.slots[index]): share for share, index in mix} == {
        ("a", 0): 0.5,
        ("b", 1): 0.5,
        ("c", 0): 0.5,
        ("", 1): 0.5,
    }


def planned(*entries: Entry) -> list[dict[str, float]]:
    line = timeline(Scheduled((Text("base"),), entries), STEPS)
    return [shares(line, step) for step in range(STEPS)]


def test_a_schedule_is_its_base_wherever_no_entry_says_otherwise() -> None:
    told = planned(Entry(When(2), When(4), (Text("a"),)), Entry(When(0.6, share=True), When(8), (Text("b"),)))
    base, a, b = {"base": 1.0}, {"a": 1.0}, {"b": 1.0}
    assert told == [base, base, a, a, base, base, b, b, base, base]


def test_a_ramp_of_a_schedule_stays_where_it_went_to() -> None:
    told = planned(Entry(When(2), When(4), (Text("a"),), ramp=True), Entry(When(6), When(7), (Text("b"),)))
    half = {"base": 0.5, "a": 0.5}
    assert told == [{"base": 1.0}] * 3 + [half] + [{"a": 1.0}] * 2 + [{"b": 1.0}] + [{"a": 1.0}] * 3


def test_a_ramp_of_a_schedule_comes_from_what_ends_where_it_begins() -> None:
    told = planned(Entry(When(0), When(4), (Text("a"),)), Entry(When(4), When(6), (Text("b"),), ramp=True))
    assert told == [{"a": 1.0}] * 5 + [{"a": 0.5, "b": 0.5}] + [{"b": 1.0}] * 4


@pytest.mark.parametrize(
    ("prompt", "place"),
    [
        ((Switch((Text("red"),), (Text("blue sky"),), When(11)),), "11 in [red:blue sky:11] is past the last step, 10"),
        ((Switch((), (Weighted((Text("blue"),), 2.0),), When(60)),), "60 in [:blue:60] is past the last step, 10"),
        ((Switch((), (Text("a"),), When(1.5, share=True)),), "1.5 in [:a:1.5] is past the last step, 10"),
        ((Ramp((Text("a"),), (Text("b"),), When(3), When(12)),), "12 in [a:b:3-12] is past the last step, 10"),
        ((Ramp((Text("a"),), (Text("b"),), When(3), When(0.1, True)),), "[a:b:3-0.1] ends before it begins"),
        (
            Scheduled((), (Entry(When(0), When(5), ()), Entry(When(5), When(11), ()))),
            "11 in part 2 of the schedule is past the last step, 10",
        ),
        (
            Scheduled((), (Entry(When(0), When(5), ()), Entry(When(0.4, True), When(6), ()))),
            "part 2 of the schedule begins before the last one ends",
        ),
        (Scheduled((), (Entry(When(6), When(0.5, True), ()),)), "part 1 of the schedule ends before it begins"),
    ],
)
def test_what_lies_past_the_last_step_is_refused_with_its_place(prompt: Prompt, place: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        timeline(prompt, STEPS, "negative_prompt")
    assert raised.value.message == f"negative_prompt: {place}"
    assert raised.value.param == "negative_prompt"


def test_the_end_itself_is_a_step_that_never_comes() -> None:
    for when in (When(10), When(1.0, share=True)):
        assert schedule_of((Switch((Text("a"),), (Text("b"),), when),)) == ["a"]
    assert schedule_of((Switch((Text("a"),), (Text("b"),), When(0)),)) == ["b"]


def schedule_of(words: Words) -> list[str]:
    line = timeline(words, STEPS)
    return [next(iter(shares(line, first))) for first, _ in line.phases]


@pytest.mark.parametrize("weights", [(1000.0, 1000.0), (float("nan"), 1.0), (1e300, 1e300)])
def test_a_weight_out_of_range_names_its_words(weights: tuple[float, float]) -> None:
    words = (Text("a "), Weighted((Weighted((Text("red"),), weights[0]),), weights[1]))
    with pytest.raises(InvalidRequest, match="prompt: the weight of 'red' is beyond 1000"):
        timeline(words, STEPS)


def test_more_texts_than_an_order_may_have_are_refused() -> None:
    options = tuple((Text(str(number)),) for number in range(MAX_TEXTS + 1))
    with pytest.raises(InvalidRequest, match=f"prompt: its steps make more than {MAX_TEXTS} texts of it"):
        timeline((Alternate(options),), 150)
    assert len(timeline((Alternate(options[:-1]),), 150).texts) == MAX_TEXTS
    ramps = tuple(Ramp((Text("a"),), (Text("b"),), When(0), When(9 - number)) for number in range(7))
    with pytest.raises(InvalidRequest, match=f"more than {MAX_TEXTS} texts"):
        timeline(ramps, STEPS)


def test_brackets_that_share_a_rule_are_one_choice() -> None:
    """Ten thousand alternations are two texts."""
    line = timeline((Alternate(((Text("a"),), (Text("b"),))),) * 10_000, 150)
    assert [len(said(flat)) for flat in line.texts] == [10_000, 10_000]


WHENS = st.builds(When, st.integers(0, STEPS).map(float)) | st.builds(When, st.floats(0, 1), st.just(True))
LEAVES = st.sampled_from("abc").map(Text) | st.builds(Concept, st.just("cat"))


def changes(words: st.SearchStrategy[Words]) -> st.SearchStrategy[object]:
    return (
        st.builds(Switch, words, words, WHENS)
        | st.builds(Ramp, words, words, st.just(When(1)), st.just(When(7)))
        | st.builds(Alternate, st.lists(words, min_size=1, max_size=3).map(tuple))
        | st.builds(Weighted, words, st.sampled_from([0.5, 1.5]))
    )


WORDS = st.recursive(
    st.lists(LEAVES, max_size=2).map(tuple),
    lambda words: st.lists(LEAVES | changes(words), max_size=3).map(tuple),
    max_leaves=8,
)
PROMPTS = WORDS | st.builds(
    Blend, st.lists(st.builds(Part, WORDS, st.sampled_from([0.5, 1.0])), min_size=1, max_size=3).map(tuple)
)


@given(PROMPTS)
def test_every_step_reads_whole_texts(prompt: Prompt) -> None:
    """Shares add up to 1, phases rise and differ, and every text is read and named once."""
    line = timeline(prompt, STEPS)
    assert line.phases[0][0] == 0
    assert all(one[0] < other[0] < STEPS and one[1] != other[1] for one, other in pairwise(line.phases))
    assert len(set(line.texts)) == len(line.texts) <= MAX_TEXTS
    mixes = [mix for _, now in line.phases for _, mix in now]
    assert {index for mix in mixes for _, index in mix} == set(range(len(line.texts)))
    assert all(sum(share for share, _ in mix) == pytest.approx(1.0) for mix in mixes)


def naive(words: Words, step: int) -> list[tuple[float, str]]:
    """What a step reads, by going through the tree for that step alone."""
    told: list[tuple[float, str]] = [(1.0, "")]
    for word in words:
        match word:
            case Text(text):
                own = [(1.0, text)]
            case Concept(name):
                own = [(1.0, f"<{name}>")]
            case Weighted(inner, _, _):
                own = naive(inner, step)
            case Switch(before, after, when):
                own = naive(after if step >= when.step(STEPS) else before, step)
            case Alternate(options):
                own = naive(options[step % len(options)], step)
            case _:
                raise AssertionError(word)
        told = [(share * part, text + more) for share, text in told for part, more in own]
    return told


@given(WORDS.filter(lambda words: "Ramp" not in repr(words)))
def test_a_step_reads_what_its_place_in_the_tree_says(words: Words) -> None:
    line = timeline(words, STEPS)
    for step in range(STEPS):
        ((_, ((_, index),)),) = lanes(line, step)
        text = "".join(each.text for each in line.texts[index] if isinstance(each, Span))
        assert naive(words, step) == [(1.0, text)]


def test_plain_text_changes_in_no_step() -> None:
    line = timeline(parse("[a|b] (c:1.5) AND", syntax=Syntax.PLAIN), STEPS)
    assert line.texts == ((Span("[a|b] (c:1.5) AND", 1.0),),)
