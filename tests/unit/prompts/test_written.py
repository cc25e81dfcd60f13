import contextlib

import pytest
from hypothesis import given, settings
from support.prompt_trees import TEXTS, prompt_trees

from serve.domain.text import Syntax
from serve.errors import InvalidRequest
from serve.prompts.ast import Blend, Prompt
from serve.prompts.normal import normal
from serve.prompts.parse import parse
from serve.prompts.templates import expand
from serve.prompts.written import written


@settings(max_examples=50, deadline=None)
@given(prompt_trees())
def test_what_is_written_is_read_as_the_same_prompt(prompt: Prompt) -> None:
    assert parse(written(prompt)) == normal(prompt)


@settings(max_examples=50, deadline=None)
@given(prompt_trees())
def test_the_normal_form_is_final_and_is_written_the_same(prompt: Prompt) -> None:
    assert normal(normal(prompt)) == normal(prompt)
    assert written(normal(prompt)) == written(prompt)


@settings(max_examples=50, deadline=None)
@given(TEXTS)
def test_any_text_that_is_read_can_be_written_and_read_again(text: str) -> None:
    for syntax in Syntax:
        with contextlib.suppress(InvalidRequest):
            prompt = parse(text, syntax=syntax)
            assert normal(prompt) == prompt
            assert parse(written(prompt)) == prompt


@settings(max_examples=50, deadline=None)
@given(prompt_trees())
def test_what_is_written_is_no_template(prompt: Prompt) -> None:
    text = written(prompt)
    assert expand(text, {"x": "y"}, seed=7) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a (cat:1.50), [dog", "a (cat:1.5), [dog]"),
        ("((a) (b:2)", "((a))( )((b:2))"),
        ("a: b | c", "a: b | c"),
        ("(a: b | c)", r"(a\: b | c)"),
        ("[a : b : 0.50 - 1.]", "[a : b :0.5-1.0]"),
        ("[:b:0]", "[b:0.0]"),
        ("[a\\|b|c]", r"[a\|b|c]"),
        ("a  BREAK b", "a BREAK b"),
        ("a {b}", r"a \{b\}"),
        ("a:1 AND b : 1e-1 AND c", r"a AND b :0.1 AND c"),
        ("a AND b\\:3", r"a AND b\:3"),
        ('("a \\"x\\"","b").blend(2,1)', '("a \\"x\\"", "b").blend(2, 1)'),
        ('("a {}", "b").and(1,1)', r'("a \{\}", "b").and()'),
        (r'(\"a", "b").blend(1)', r'(\"a", "b").blend(1)'),
        ('("a","b").schedule(0~.5)', '("a", "b").schedule(0.0~0.5)'),
    ],
)
def test_how_it_is_written(text: str, expected: str) -> None:
    assert written(parse(text)) == expected


def test_other_syntaxes_are_written_in_this_one() -> None:
    assert written(parse("a (red cat)++ (b)0.5", syntax=Syntax.COMPEL)) == "a ((red cat)) (b:0.5)"
    assert written(parse("a (b) [c|d] AND e", syntax=Syntax.PLAIN)) == r"a \(b\) \[c|d\] A\ND e"


def test_a_call_of_nothing_has_no_text() -> None:
    with pytest.raises(ValueError, match="nothing"):
        written(Blend(()))
