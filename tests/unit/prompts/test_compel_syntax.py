import re
from typing import Any

import pytest
from compel import prompt_parser as compel
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prompt_trees import weights_of

from serve.domain.text import Syntax
from serve.errors import InvalidRequest
from serve.prompts.ast import Blend, Concept, Conjunction, Part, Prompt, Text, Weighted, Words
from serve.prompts.parse import parse
from serve.prompts.places import MAX_CHARACTERS

ORACLE = compel.PromptParser()
Weighed = list[tuple[str, float]]


def read(text: str) -> Prompt:
    return parse(text, syntax=Syntax.COMPEL)


def by_word(runs: list[tuple[str, float]]) -> Weighed:
    return [(word, pytest.approx(weight)) for text, weight in runs for word in re.split(r"[ \t\n\r]+", text) if word]


def ours(text: str) -> tuple[str, list[float], list[Weighed]]:
    prompt = read(text)
    match prompt:
        case Blend(parts, normalize):
            kind = "blend" if normalize else "blend as it is"
        case Conjunction(parts):
            kind = "and"
        case _:
            parts, kind = (Part(prompt),), "and"
    return kind, [part.weight for part in parts], [by_word(weights_of(part.prompt)) for part in parts]


def theirs(text: str) -> tuple[str, list[float], list[Weighed]]:
    def fragments(flattened: Any) -> Weighed:
        return by_word([(child.text, child.weight) for child in flattened.children])

    whole = ORACLE.parse_conjunction(text)
    if len(whole.prompts) == 1 and isinstance(whole.prompts[0], compel.Blend):
        blend = whole.prompts[0]
        kind = "blend" if blend.normalize_weights else "blend as it is"
        return kind, blend.weights, [fragments(each) for each in blend.prompts]
    if not whole.prompts:  # of nothing but empty brackets
        return "and", [1.0], [[]]
    return "and", whole.weights, [fragments(each) for each in whole.prompts]


EXAMPLES = [
    "a red circle",
    "a red++ circle",
    "a (red circle)-- here",
    "(red (dark)++ circle)1.5 x",
    '"red circle"+ and "blue"0.5',
    'red.attend(1.5) (a b) .attend( ++ ) "x y".attend(---) one.attend(1.0)',
    "foo-bar foo+bar +x -y x- 5 -5+ 1.5 a.b",
    "a (b",
    "a ( b c) ( d (e",
    "a (b = c)++ d",
    "a (b, c. d)++, e,f,,,g",
    "x++y--z (a)++(b)-- (a)20",
    '"a (b) c" "unclosed ',
    'a "b = c" d',
    '"a \\"quoted\\" b"++',
    r"\(a\) \+ \- (\(b\)++)++",
    "(a) ++ (b)+ +",
    '() (  ) "" ',
    "()",
    "((((a)+)+)+)+",
    "(a))++ (b)+",
    '("a b", "c++ d").blend(0.7, 0.3)',
    '("a b", "c").blend(0.7, -0.3, no_normalize)',
    '(a, (b c), "d++").and(1, 0.5, 2)',
    '(a, (b c)++, "d").and(1, 0.5, 2)',
    '("a = b", "c").and()',
    '("a", "b") .add ( 1 , .5 )',
    '("a", "b").blending(1, 1)',
    "(a, b)",
    "(x:1.5) [y] BREAK z AND",
    "the <my-cat>++ (a <my-cat> b)--",
    "a\tb\n(c\nd)+",
    '"a\nb" c',
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_it_is_what_compels_parser_says(text: str) -> None:
    assert ours(text) == theirs(text)


PIECES = st.sampled_from(
    [
        *[
            "cat",
            "a b",
            " ",
            ", ",
            ",",
            ".",
            "(",
            ")",
            "(a b)",
            "(c)",
            '"',
            '"a b"',
            '\\"',
            r"\(",
            r"\)",
            r"\+",
            "é",
            "-x",
        ],
        *["+", "++", "-", "--", "1.5", "2", ".5", "=", ".attend(", "++)", "0.5)", ':"', "\n", "<c>"],
        *['("a", "b")', ".blend(", ".and(", "1, 2)", "no_normalize)"],
    ]
)
REFUSED = re.compile(r"\.(blend|and|add|swap)|Lora|<\w+:|\d{4}")


def agree(pieces: list[str]) -> None:
    text = "".join(pieces)
    try:
        expected = theirs(text)
    except (compel.PromptParser.ParsingException, compel.pp.ParseException, ValueError, IndexError):
        return
    try:
        said = ours(text)
    except InvalidRequest:
        assert REFUSED.search(text)
        return
    assert said == expected


@settings(max_examples=20, deadline=None)
@given(st.lists(PIECES, max_size=5))
def test_anything_is_read_as_compels_parser_reads_it(pieces: list[str]) -> None:
    agree(pieces)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(st.lists(PIECES, max_size=8))
def test_anything_longer_is_read_as_compels_parser_reads_it(pieces: list[str]) -> None:
    agree(pieces)


def weighted(text: str, factor: float = 1.0, steps: int = 0) -> Weighted:
    return Weighted((Text(text),), factor, steps)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("a red++ circle", (Text("a "), weighted("red", steps=2), Text(" circle"))),
        ("(a b)+ c+", (weighted("a b c", steps=1),)),
        ("a- b+", (weighted("a", 0.9), Text(" "), weighted("b", steps=1))),
        ("a <b>+ c", (Text("a "), Weighted((Concept("b"),), steps=1), Text(" c"))),
        (r"\{a\} {b}", (Text("{a} {b}"),)),
        ("a,b", (Text("a, b"),)),
    ],
)
def test_words_keep_one_blank_between_them(text: str, expected: Words) -> None:
    assert read(text) == expected


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("a cat.swap(dog)", 7, ".swap() is not supported yet"),
        ("a withLora(x, 1) b", 3, ".withLora() is not supported yet"),
        ("a useLora(x)", 3, ".useLora() is not supported yet"),
        ("a,b <lora:x:1>", 5, "<lora:...>"),
        ("a,b,(c)2023", 8, "beyond"),
        ("a,b,(c d)2023", 10, "beyond"),
        ("a " + "b" + "+" * 200, 3, "beyond"),
        ("((a b)500)500", 3, "beyond"),
        ('("a", "b").blend(1)', 18, "1 weights for 2"),
        ('("a", "b").blend(x, 1)', 18, "not a number"),
        ('("a", "b").blend(1, nan)', 21, "not a number"),
        ('("a", "b").blend(1, -1)', 12, "add up to nothing"),
        ('("a", "b").and(1, 1) c', 22, "whole prompt"),
        ('("a", "b").blend(1, 1', 12, "never closed"),
        ("a " + "(" * 10_000, 103, "brackets"),
        ("a\x00", 2, "control character"),
        ("," * 1_000_000, MAX_CHARACTERS + 1, "at most"),
    ],
)
def test_what_is_not_read_is_refused_where_it_stands(text: str, place: int, reason: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse(text, "negative_prompt", Syntax.COMPEL)
    assert raised.value.message.startswith(f"negative_prompt: character {place}: ")
    assert reason in raised.value.message
    assert raised.value.param == "negative_prompt"


def test_plain_text_has_no_syntax() -> None:
    text = r" (a:2) [b|c] AND ("
    assert parse(text, syntax=Syntax.PLAIN) == (Text(text),)
    assert parse("", syntax=Syntax.PLAIN) == ()
