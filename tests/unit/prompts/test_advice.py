"""Advice says what it should, and nothing of a prompt that there is nothing to say of."""

from collections.abc import Mapping
from typing import Any

import pytest

from serve.domain.text import LongPrompt, Note, Syntax, TextRequest
from serve.prompts.advice import advice_on, notes_on
from serve.prompts.plan import Planner

FINE = "a large red circle to the left of a blue square on a white background"


def request(prompt: str, negative: str | None = None, **fields: Any) -> TextRequest:
    given = {"model": "m", "width": 64, "height": 64, "num_inference_steps": 20} | fields
    return TextRequest(prompt=prompt, negative_prompt=negative, **given)


def advice(planner: Planner, prompt: str, negative: str | None = None, *, guided: bool = True, **fields: Any) -> Any:
    asked = request(prompt, negative, **fields)
    return advice_on(asked, planner.plan(asked), planner.tokenizers, guided=guided)


def codes(notes: tuple[Note, ...]) -> list[tuple[str, str]]:
    return [(note.field, note.code) for note in notes]


@pytest.mark.parametrize("text", [FINE, "", "a (red:1.3) circle, [blue:green:0.5] ring", "a {b}", r"\(red:2\)"])
def test_there_is_nothing_to_say_of_a_decent_prompt(planner: Planner, text: str) -> None:
    assert advice(planner, text, "a star") == ()
    assert notes_on(request(text, "a star")) == ()


def test_a_blend_that_does_not_add_up_is_noted(planner: Planner) -> None:
    (note,) = notes_on(request('("red", "blue").blend(0.9, 0.3)', '("a", "b").blend(0.5, 0.5)'))
    assert (note.field, note.code) == ("prompt", "normalized")
    assert "0.9, 0.3" in note.message
    assert "1.2" in note.message
    assert "0.75, 0.25" in note.message
    assert notes_on(request('("red", "blue").blend(0.9, 0.3, no_normalize)')) == ()
    (note,) = notes_on(request("a", '("red", "blue").blend(1, 1)', syntax=Syntax.COMPEL))
    assert note.field == "negative_prompt"
    nested = '("a", "(\\"b\\", \\"c\\").blend(1, 1)").schedule(5-10)'
    assert [note.code for note in notes_on(request(nested))] == ["normalized"]
    assert notes_on(request("read the .blend(file", syntax=Syntax.PLAIN)) == ()


def test_heavy_and_negative_weights(planner: Planner) -> None:
    heavy, below = advice(planner, "a (red:1.7) (large:-0.5) (circle:1.6)")
    assert codes((heavy, below)) == [("prompt", "heavy"), ("prompt", "negative_weight")]
    assert "red (1.7)" in heavy.message
    assert "circle" not in heavy.message
    assert "large (-0.5)" in below.message


def test_the_prompt_and_the_negative_one_ask_for_the_same(planner: Planner) -> None:
    (note,) = advice(planner, FINE, "a star, the Red Circle, a green circle")
    assert (note.field, note.code) == ("negative_prompt", "contradiction")
    assert "the Red Circle" in note.message
    assert "green" not in note.message
    assert advice(planner, "a (red:-1) circle", "red")[-1].code != "contradiction", "a negative weight asks for less"
    assert advice(planner, "a circle", "a, the, of") == (), "words that say nothing contradict nothing"


def test_what_nobody_reads(planner: Planner) -> None:
    assert codes(advice(planner, "a circle", "a star", guided=False)) == [("negative_prompt", "unread")]
    assert advice(planner, "a circle", "", guided=False) == ()


def test_words_outside_the_vocabulary(planner: Planner) -> None:
    """The shipped model's is small: it spells what it does not know letter by letter."""
    (note,) = advice(planner, "a red xylophonequartzz")
    assert note.code in ("unknown", "rare")
    assert "xylophonequartzz" in note.message


def test_what_is_cut_and_what_is_long(planner: Planner) -> None:
    long = "a red circle, " * 40
    assert ("prompt", "long") in codes(advice(planner, long))
    (note,) = [note for note in advice(planner, long, long_prompt=LongPrompt.HEAD) if note.code == "cut"]
    assert "don't fit" in note.message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a [red:blue:1.0] circle", "never switches"),
        ("a [red:blue:0.01] circle", "before the first"),
        ("a [red:blue:0.5-0.51] circle", "is a switch"),
        ("a ((([red:(blue:1.2):20]))) circle", "'blue'"),
    ],
)
def test_changes_that_no_step_sees(planner: Planner, text: str, told: str) -> None:
    notes = advice(planner, text)
    assert ("prompt", "schedule") in codes(notes)
    assert told in " ".join(note.message for note in notes)


@pytest.mark.parametrize(
    ("text", "syntax", "other"),
    [
        ("a red++ circle", Syntax.A1111, "compel"),
        ("a (red circle)-- here", Syntax.A1111, "compel"),
        ("a (red:1.3) circle", Syntax.PLAIN, "a1111"),
        ("a [red:blue:0.5] circle", Syntax.COMPEL, "a1111"),
    ],
)
def test_another_syntax_s_signs(planner: Planner, text: str, syntax: Syntax, other: str) -> None:
    notes = [note for note in advice(planner, text, syntax=syntax) if note.code == "syntax"]
    assert [other in note.message for note in notes] == [True]


@pytest.mark.parametrize("text", ["a well-known C++17 logo", "a (red) circle", "1:2", "a--b"])
def test_what_only_looks_like_it(planner: Planner, text: str) -> None:
    assert "syntax" not in {note.code for note in advice(planner, text)}


def test_every_family_has_advice(planners: Mapping[str, Planner]) -> None:
    for planner in planners.values():
        notes = advice(planner, "a (red:3) circle " * 200, "red")
        assert {"heavy", "contradiction"} <= {note.code for note in notes}
        assert all(len(note.message) < 600 for note in notes)
