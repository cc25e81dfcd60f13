import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prompt_trees import SIGNS, TEXTS, weights_of

from serve.errors import InvalidRequest
from serve.prompts.ast import Break, Concept, Text, Weighted
from serve.prompts.parse import parse, words
from serve.prompts.places import MAX_CHARACTERS, MAX_WEIGHT


def pairs(text: str) -> list[tuple[str, float]]:
    return [(run, pytest.approx(weight, rel=1e-12)) for run, weight in weights_of(words(text))]


# The examples that A1111 publishes with `parse_prompt_attention`.
PUBLISHED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
}


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_examples(text: str) -> None:
    assert pairs(text) == PUBLISHED[text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("()", []),
        ("((x))", [("x", 1.21)]),
        ("[x]", [("x", 1 / 1.1)]),
        ("[[x", [("x", 1 / 1.21)]),
        ("(x:0)", [("x", 0.0)]),
        ("(x: -.5 )", [("x", -0.5)]),
        ("(x:+2)", [("x", 2.0)]),
        ("(x:1e-1)", [("x", 0.1)]),
        ("((x:2):3)", [("x", 6.0)]),
        ("(a:b:2)", [("a:b", 2.0)]),
        ("x) y] z", [("x) y] z", 1.0)]),
        ("x:1.5)", [("x:1.5)", 1.0)]),
        ("x:nan)", [("x:nan)", 1.0)]),
        ("(x:1.5", [("x:1.5", 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]),
        (r"\\ \( \[ \] \) \| \{ \} \: \<", [(r"\ ( [ ] ) | { } : <", 1.0)]),
        (r"a\b", [("ab", 1.0)]),
        ("a\\", [("a", 1.0)]),
        (r"(x\)y)", [("x)y", 1.1)]),
        ("a:b | c", [("a:b | c", 1.0)]),
        ("[a:b]", [("a:b", 1 / 1.1)]),
        ("(a|b)", [("a|b", 1.1)]),
        ("a|b] c", [("a|b] c", 1.0)]),
        ("[a|b", [("a|b", 1 / 1.1)]),
        (r"[a\|b]", [("a|b", 1 / 1.1)]),
        (r"[a\:3]", [("a:3", 1 / 1.1)]),
        (r"[a:\3]", [("a:3", 1 / 1.1)]),
        ("[a:b:c:3]", [("a:b:c:3", 1 / 1.1)]),
        ("[a:b) c:3]", [("a:b) c:3", 1 / 1.1)]),
        ("(x:٣)", [("x:٣", 1.1)]),
        ("SAND BREAKFAST and break", [("SAND BREAKFAST and break", 1.0)]),
        (r"salt A\ND pepper, B\REAK", [("salt AND pepper, BREAK", 1.0)]),
        ("1 < 2, <:x>, <a b>, <lora:x", [("1 < 2, <:x>, <a b>, <lora:x", 1.0)]),
        ("(<x:1.5)", [("<x", 1.5)]),
        ("{a} b | {c", [("{a} b | {c", 1.0)]),
    ],
)
def test_syntax(text: str, expected: list[tuple[str, float]]) -> None:
    assert pairs(text) == expected


def test_brackets_that_undo_each_other_leave_no_trace() -> None:
    assert words("a ([red]) circle") == (Text("a red circle"),)


def test_a_break_has_no_weight_and_no_blanks_around_it() -> None:
    a, b = Weighted((Text("a"),), steps=1), Weighted((Text("b"),), steps=1)
    assert words("(a \n BREAK b)") == (a, Break(), b)
    assert words("(a ) BREAKBREAK BREAK ( b)") == (
        Weighted((Text("a "),), steps=1),
        Text(" BREAKBREAK"),
        Break(),
        b,
    )
    assert words("BREAK BREAK") == (Break(), Break())


def test_a_concept_is_a_word_of_its_own_with_a_weight() -> None:
    named = (Text("a "), Weighted((Text("red "), Concept("my-cat_2")), factor=1.5), Text(" here"))
    assert words("a (red <my-cat_2>:1.5) here") == named
    assert words(r"a \<my-cat>") == (Text("a <my-cat>"),)
    long = "x" * 65
    assert words(f"<{long}>") == (Text(f"<{long}>"),)


@pytest.mark.parametrize(
    ("text", "named", "place"),
    [
        ("cat <lora:style:0.8>", "<lora:...>", 5),
        ("<a:> <hypernet:x:1>", "<hypernet:...>", 6),
        ("(a <lora:x>:1.2)", "<lora:...>", 4),
    ],
)
def test_extra_networks_are_refused_by_name_and_place(text: str, named: str, place: int) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse(text, "negative_prompt")
    assert raised.value.param == "negative_prompt"
    assert f"negative_prompt: character {place}: {named}" in raised.value.message
    assert "not supported yet" in raised.value.message


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("(x:1.2.3)", 4),
        ("(x:.)", 4),
        ("a (x: 1001)", 7),
        ("(x:1e9)", 4),
        ("(x:NaN)", 4),
        ("(x:-inf)", 4),
        ("(x:Infinity)", 4),
        ("(x:" + "9" * 500 + ")", 4),
        ("(" * 80 + "x", 81),
        ("((x:100):100)", 3),
        ("((\\(:-100):100)", 3),
        ("([a:(b:900):3]:2)", 6),
        ("a AND b :1e9", 10),
        ("a AND b\n:nan ", 10),
        ('("a", "b").blend(1, 1e9)', 21),
        ('("a", "b").and(1, nan)', 19),
        ('("a", "(b:1e9)").and(1, 1)', 11),
    ],
)
def test_impossible_weights_are_refused_where_they_stand(text: str, place: int) -> None:
    with pytest.raises(InvalidRequest, match=f"^prompt: character {place}: .*weight") as raised:
        parse(text)
    assert raised.value.param == "prompt"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a\x00b", 2),
        ("\x7f", 1),
        ("ab\ud800", 3),
        ("\udfff" * 10_000, 1),
        ("," * 1_000_000, MAX_CHARACTERS + 1),
        ("(" * 10_000, 101),
        ("[" * 10_000, 101),
        ("([" * 5_000, 101),
        ("[)" * 5_000, 201),
        ("a " + "AND " * 4_000, 258),
        ("(" * 8_000 + ")" * 8_000, 101),
    ],
)
def test_hostile_text_is_refused_where_it_goes_wrong(text: str, place: int) -> None:
    with pytest.raises(InvalidRequest, match=f"^prompt: character {place}: ") as raised:
        parse(text)
    assert len(raised.value.message) < 200


def trees() -> st.SearchStrategy[list[tuple[str, object]]]:
    word = st.tuples(st.just("word"), st.sampled_from(["cat", "dog ", " sun", "é", ","]))
    return st.recursive(
        st.lists(word, min_size=1, max_size=3),
        lambda inner: st.lists(
            st.one_of(
                word,
                st.tuples(st.sampled_from(["()", "[]", "(:2)", "(:0.5)"]), inner),
            ),
            min_size=1,
            max_size=4,
        ),
        max_leaves=12,
    )


def render(tree: list[tuple[str, object]], weight: float) -> tuple[str, list[tuple[str, float]]]:
    """The tree in A1111's syntax, and the weight of each of its words."""
    text, words = "", []
    for kind, content in tree:
        if kind == "word":
            text += content
            words.append((content, weight))
            continue
        factor = {"()": 1.1, "[]": 1 / 1.1, "(:2)": 2.0, "(:0.5)": 0.5}[kind]
        inner, inner_words = render(content, weight * factor)
        text += f"{kind[0]}{inner}{kind[1:]}"
        words += inner_words
    return text, words


@settings(max_examples=100, deadline=None)
@given(trees())
def test_weights_multiply_along_the_nesting(tree: list[tuple[str, object]]) -> None:
    text, expected_words = render(tree, 1.0)
    expected = [(char, weight) for word, weight in expected_words for char in word]
    got = [(char, weight) for run, weight in weights_of(words(text)) for char in run]
    assert [char for char, _ in got] == [char for char, _ in expected]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in expected])


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidRequest):
        parse(text)
    with contextlib.suppress(InvalidRequest):
        for word in words(text):
            assert not isinstance(word, Text) or word.text
            assert not isinstance(word, Weighted) or abs(word.factor * 1.1**word.steps) <= MAX_WEIGHT


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=SIGNS.replace("<", "").replace(">", "")))
def test_escaped_text_is_read_literally(text: str) -> None:
    escaped = "".join(f"\\{char}" if char in r"()[]{}\|:" else char for char in text)
    assert words(escaped) == ((Text(text),) if text else ())
