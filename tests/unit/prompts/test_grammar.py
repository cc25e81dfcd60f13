import contextlib
import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import InvalidRequest
from serve.prompts.grammar import MAX_WEIGHT, Span, parse


def pairs(text: str) -> list[tuple[str, float]]:
    return [(span.text, pytest.approx(span.weight, rel=1e-12)) for span in parse(text)]


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
        ("((x:2):3)", [("x", 6.0)]),
        ("(a:b:2)", [("a:b", 2.0)]),
        ("x) y] z", [("x) y] z", 1.0)]),
        ("x:1.5)", [("x:1.5)", 1.0)]),
        ("(x:1.5", [("x:1.5", 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]),
        (r"\\ \( \[ \] \) \|", [(r"\ ( [ ] ) |", 1.0)]),
        (r"a\b", [("ab", 1.0)]),
        (r"(x\)y)", [("x)y", 1.1)]),
        ("a:b | c", [("a:b | c", 1.0)]),
        ("[a:b]", [("a:b", 1 / 1.1)]),
        ("(a|b)", [("a|b", 1.1)]),
        ("a|b] c", [("a|b] c", 1.0)]),
        ("[a|b", [("a|b", 1 / 1.1)]),
        (r"[a\|b]", [("a|b", 1 / 1.1)]),
        ("(x:٣)", [("x:٣", 1.1)]),
        ("SAND BREAKFAST and break", [("SAND BREAKFAST and break", 1.0)]),
        ("1 < 2, a <b> c, <:x>, <lora:x", [("1 < 2, a <b> c, <:x>, <lora:x", 1.0)]),
    ],
)
def test_syntax(text: str, expected: list[tuple[str, float]]) -> None:
    assert pairs(text) == expected


def test_brackets_that_undo_each_other_leave_no_trace() -> None:
    assert parse("a ([red]) circle") == (Span("a red circle", 1.0),)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[cat:dog:0.5]", "[from:to:when]"),
        ("a [cat:10] b", "[from:to:when]"),
        ("[cat::5]", "[from:to:when]"),
        ("[(cat:1.2):dog: 5 ]", "[from:to:when]"),
        ("[cat|dog]", "[a|b]"),
        ("([cat|(dog)])", "[a|b]"),
        ("cat AND dog", "AND"),
        ("cat AND dog:1.2", "AND"),
        ("cat BREAK dog", "BREAK"),
        ("(cat\nBREAK)", "BREAK"),
        ("cat <lora:style:0.8>", "<lora:...>"),
        ("<a:> <hypernet:x:1>", "<hypernet:...>"),
    ],
)
def test_unsupported_constructs_are_named(text: str, named: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse(text, "negative_prompt")
    assert raised.value.param == "negative_prompt"
    assert f"negative_prompt: {named} " in raised.value.message
    assert "not supported yet" in raised.value.message


@pytest.mark.parametrize("text", ["(x:1.2.3)", "(x:.)", "(x:1001)", "(" * 100 + "x", "(x:" + "9" * 500 + ")"])
def test_impossible_weights_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="weight") as raised:
        parse(text)
    assert raised.value.param == "prompt"


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


@given(trees())
def test_weights_multiply_along_the_nesting(tree: list[tuple[str, object]]) -> None:
    text, words = render(tree, 1.0)
    expected = [(char, weight) for word, weight in words for char in word]
    got = [(char, span.weight) for span in parse(text) for char in span.text]
    assert [char for char, _ in got] == [char for char, _ in expected]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in expected])


@given(st.text(alphabet=r"ab ()[]:|\.5-1<>é") | st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    spans: tuple[Span, ...] = ()
    with contextlib.suppress(InvalidRequest):
        spans = parse(text)
    assert all(span.text and abs(span.weight) <= MAX_WEIGHT for span in spans)
    assert all(left.weight != right.weight for left, right in itertools.pairwise(spans))


@given(st.text(alphabet=r"ab ()[]\:|1.5é"))
def test_escaped_text_is_read_literally(text: str) -> None:
    escaped = "".join(f"\\{char}" if char in r"()[]\|" else char for char in text)
    assert "".join(span.text for span in parse(escaped)) == text


@pytest.mark.parametrize(
    "unit", ["(", "[", ")", "(a", "[a", ":1.", "(:", "<a:", "\\", "(a:1 ", ": ", "[|", "<aaaa", "(a)[b]"]
)
def test_hostile_text_takes_linear_time(unit: str) -> None:
    text = unit * (200_000 // len(unit))
    started = time.process_time()
    with contextlib.suppress(InvalidRequest):
        parse(text)
    assert time.process_time() - started < 5.0  # quadratic time would be minutes
