import contextlib
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prompt_trees import TEXTS

from serve.errors import InvalidRequest
from serve.prompts.parse import words
from serve.prompts.templates import expand, names

TEMPLATE = "a {red|blue|green} {circle|square} on {white|black|{dark|light} gray}"
VALUES = st.dictionaries(st.sampled_from("xyz"), TEXTS, min_size=3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a {subject} here", "a red cat here"),
        ("{subject}{subject}", "red catred cat"),
        ("{ subject }", "{ subject }"),
        ("{} {a b} {1} {-}", "{} {a b} {1} {-}"),
        ("a } b { c | d", "a } b { c | d"),
        (r"\{subject\}", r"\{subject\}"),
        (r"\\{subject}", r"\\red cat"),
        ("{a b} {subject} {", r"\{a b\} red cat \{"),
        ("{only|only}", "only"),
        ("{|} x", " x"),
        ("{{subject}|{subject}}", "red cat"),
        ("{2::a|2::a}", "2::a"),
        ("[a|b] {subject}", "[a|b] red cat"),
    ],
)
def test_variables_are_filled_in_and_other_braces_are_text(text: str, expected: str) -> None:
    assert expand(text, {"subject": "red cat"}, seed=1) == expected


def test_a_value_is_prompt_text_but_no_template() -> None:
    filled = expand("{a}, {b}", {"a": "(x:1.2) {b|b} \\{c} [d|e] \\", "b": "y"}, seed=0)
    assert filled == r"(x:1.2) \{b|b\} \{c\} [d|e] , y"


@pytest.mark.parametrize(("text", "place"), [("a {cat}", 3), ("{x|x}{cat}", 6), ("{{cat}|x}", 2)])
def test_a_variable_without_a_value_is_named_with_its_place(text: str, place: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"^negative_prompt: character {place}: \{{cat\}} has no value") as raised:
        expand(text, {"dog": ""}, seed=0, field="negative_prompt")
    assert raised.value.param == "negative_prompt"


def test_a_value_that_no_prompt_may_hold_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"^variables\.cat: character 2: ") as raised:
        expand("a {cat}", {"cat": "a\ud800", "dog": "\x00"}, seed=0)
    assert raised.value.param == "variables.cat"
    assert expand("a {dog}", {"cat": "a\ud800", "dog": "dog"}, seed=0) == "a dog"


def test_choices_are_even_and_independent_over_seeds() -> None:
    drawn = Counter(expand(TEMPLATE, {}, seed) for seed in range(3600))
    assert len(drawn) == 3 * 2 * 4
    halves = sum(count for text, count in drawn.items() if "blue square" in text)
    assert 500 < halves < 700  # a sixth of 3600 is expected, and 22 is the standard deviation
    grays = sum(count for text, count in drawn.items() if "gray" in text)
    assert 1080 < grays < 1320


def test_another_choice_behind_changes_none_in_front() -> None:
    for seed in range(50):
        assert expand(TEMPLATE + " {x|y}", {}, seed).startswith(expand(TEMPLATE, {}, seed))
        assert expand("{n} " + TEMPLATE, {"n": "n"}, seed) == "n " + expand(TEMPLATE, {}, seed)


def test_the_same_in_every_process() -> None:
    told = subprocess.run(
        [sys.executable, "-c", f"from serve.prompts.templates import expand; print(expand({TEMPLATE!r}, {{}}, 2**40))"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "77", "PYTHONPATH": ":".join(sys.path)},
    )
    assert told.stdout.strip() == expand(TEMPLATE, {}, 2**40)


@settings(max_examples=100, deadline=None)
@given(TEXTS | st.text(alphabet="{{}}|\\abxyz "), VALUES, st.integers(0, 3))
def test_what_is_expanded_stays_as_it_is(text: str, values: dict[str, str], seed: int) -> None:
    with contextlib.suppress(InvalidRequest):
        filled = expand(text, values, seed)
        assert expand(filled, values, seed) == filled
        assert expand(filled, {}, seed + 1) == filled


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="{{}}|\\abxyz "))
def test_names_are_what_expansion_asks_for(text: str) -> None:
    expand(text, dict.fromkeys(names(text), ""), seed=0)
    for name in names(text):
        with pytest.raises(InvalidRequest, match=name):
            expand(text, dict.fromkeys(names(text) - {name}, ""), seed=0)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="{}ab |c\\"))
def test_without_variables_and_choices_braces_say_what_they_are(text: str) -> None:
    """Through the parser: with another part expanded, they are escaped, and read as before."""
    if names(text):
        return
    with contextlib.suppress(InvalidRequest):
        if expand(text, {}, 0) == text and not text.endswith("\\"):
            assert words(expand("{v}" + text, {"v": "v"}, 0)) == words("v" + text)


@pytest.mark.parametrize(
    "text", ["{" * 10_000, "{a|" * 10_000, "{x}" * 20_000, "{a|b}" * 200_000, "\ud800{x}", "{" + "|" * 100_000 + "}"]
)
def test_hostile_templates_are_refused_with_their_place(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: character \d+: "):
        expand(text, {"x": "x" * 8192}, seed=0)
