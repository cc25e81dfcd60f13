"""Words that change from step to step, calls and compositions."""

import pytest
from support.prompt_trees import at_step

from serve.errors import InvalidRequest
from serve.prompts.ast import (
    Alternate,
    Blend,
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
from serve.prompts.parse import parse, words

# The examples that A1111 publishes with `get_learned_conditioning_prompt_schedules`, at 10 steps: until before which
# step, the prompt. The texts are prompts themselves: their brackets weigh.
PUBLISHED: dict[str, list[tuple[int, str]]] = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "a [{b|d{:.5] c": [(5, "a  c"), (10, "a {b|d{ c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": [(step + 1, ("a", "(b:1.1)")[step % 2]) for step in range(10)],
    "[fe|]male": [(step + 1, ("female", "male")[step % 2]) for step in range(10)],
    "[fe|||]male": [(step + 1, ("female", "male", "male", "male")[step % 4]) for step in range(10)],
    # The example in that file's first lines, which has 100 steps there.
    "a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6][ in background:0.25]": [
        (2, "a mountain and an oak in foreground"),
        (6, "a lake and an oak in foreground in background"),
        (7, "a lake and an oak in background"),
        (10, "a lake and a christmas tree in background"),
    ],
}


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_schedules(text: str) -> None:
    read = words(text)
    for step in range(10):
        expected = next(prompt for end, prompt in PUBLISHED[text] if step < end)
        assert at_step(read, step, 10) == words(expected), step


def text(written: str) -> Words:
    return (Text(written),)


A, B, C = text("a"), text("b"), text("c")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("[a:b:10]", Switch(A, B, When(10.0))),
        ("[a:b: 10 ]", Switch(A, B, When(10.0))),
        ("[a:b:0.5]", Switch(A, B, When(0.5, share=True))),
        ("[a:b:1]", Switch(A, B, When(1.0))),
        ("[a:b:1.0]", Switch(A, B, When(1.0, share=True))),
        ("[a:b:1.]", Switch(A, B, When(1.0, share=True))),
        ("[a:b:0]", Switch(A, B, When(0.0, share=True))),
        ("[a:b:2e1]", Switch(A, B, When(20.0))),
        ("[a::10]", Switch(A, (), When(10.0))),
        ("[:b:10]", Switch((), B, When(10.0))),
        ("[b:10]", Switch((), B, When(10.0))),
        ("[3:10]", Switch((), text("3"), When(10.0))),
        ("[::10]", Switch((), (), When(10.0))),
        ("[:10]", Switch((), (), When(10.0))),
        ("[a:b:10-20]", Ramp(A, B, When(10.0), When(20.0))),
        ("[b: .25 - 15 ]", Ramp((), B, When(0.25, share=True), When(15.0))),
        ("[a|b]", Alternate((A, B))),
        ("[a||c|]", Alternate((A, (), C, ()))),
        ("[a:b|c]", Alternate((text("a:b"), C))),
        ("[a|b:c:10]", Switch(text("a|b"), C, When(10.0))),
        (r"[a\:b:c:10]", Switch(text("a:b"), C, When(10.0))),
        ("[(a:2):<b>:10]", Switch((Weighted(A, 2.0),), (Concept("b"),), When(10.0))),
        ("[[a|b]:c:10]", Switch((Alternate((A, B)),), C, When(10.0))),
        ("[(a|b)|c]", Alternate(((Weighted(text("a|b"), steps=1),), C))),
    ],
)
def test_changes(written: str, expected: object) -> None:
    assert words(written) == (expected,)


def test_a_weight_lies_on_a_change_as_a_whole() -> None:
    switch = Switch((Weighted(A, 0.5),), B, When(3.0))
    assert words("(x [(a:0.5):b:3]:1.5)") == (Weighted((Text("x "), switch), 1.5),)
    assert words("[[a|b]]") == (Weighted((Alternate((A, B)),), steps=-1),)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a AND b", Composition((Part(A), Part(B)))),
        ("a :0.5 AND b:-1.5 ", Composition((Part(A, 0.5), Part(B, -1.5)))),
        ("a\nAND\nb : 2.", Composition((Part(A), Part(B, 2.0)))),
        ("a AND", Composition((Part(A), Part(())))),
        (r"a\:2 AND b\\:2", Composition((Part(text("a:2")), Part(text("b\\"), 2.0)))),
        ("a:b:3 AND c:d", Composition((Part(text("a:b"), 3.0), Part(text("c:d"))))),
        ("(a AND b:2)", Composition((Part((Weighted(text("a "), steps=1),)), Part(text("b:2)"))))),
        ("a:2", text("a:2")),
        (r"a A\ND b", text("a AND b")),
        ('("a", "b").blend(1, 1) AND c', Composition((Part(Blend((Part(A), Part(B)))), Part(C)))),
        ('c AND ("a").and():2', Composition((Part(C), Part(Conjunction((Part(A),)), 2.0)))),
        ('("a", "b").blend(0.7, 0.3)', Blend((Part(A, 0.7), Part(B, 0.3)))),
        (' ( "a" ,"b" ) . blend ( 7 , -3 ) ', Blend((Part(A, 7.0), Part(B, -3.0)))),
        ('("a", "b").blend()', Blend((Part(A), Part(B)))),
        ('("a", "b").blend(no_normalize)', Blend((Part(A), Part(B)), normalize=False)),
        ('("a", "b").blend(1, -1, no_normalize)', Blend((Part(A), Part(B, -1.0)), normalize=False)),
        ('("a", "b").and(1, 0.5)', Conjunction((Part(A), Part(B, 0.5)))),
        (r'("a\"\\\\\(").and()', Conjunction((Part(text('a"\\(')),))),
        (
            '("a", "b", "c").schedule(10-20, 0.5~1.0)',
            Scheduled(
                A,
                (
                    Entry(When(10.0), When(20.0), B),
                    Entry(When(0.5, share=True), When(1.0, share=True), C, ramp=True),
                ),
            ),
        ),
        (
            r'("(\"a\", \"b\").blend()", "[a|b]").and()',
            Conjunction((Part(Blend((Part(A), Part(B)))), Part((Alternate((A, B)),)))),
        ),
        ('("a", "b")', (Weighted(text('"a", "b"'), steps=1),)),
        ('("a").', (Weighted(text('"a"'), steps=1), Text("."))),
        ('("a" b).blend(1)', (Weighted(text('"a" b'), steps=1), Text(".blend"), Weighted(text("1"), steps=1))),
        ('x ("a", "b").and()', (Text("x "), Weighted(text('"a", "b"'), steps=1), Text(".and"))),
    ],
)
def test_whole_prompts(written: str, expected: Prompt) -> None:
    assert parse(written) == expected


@pytest.mark.parametrize(
    ("written", "place", "reason"),
    [
        ("[a:b:1.5]", 6, "past the last step"),
        ("[a:b: 9999999]", 7, "past the last step"),
        ("[a:b:" + "9" * 400 + "]", 6, "past the last step"),
        ("[a:-3]", 4, "before the first step"),
        ("[a:b:20-10]", 9, "ends before it begins"),
        ("[a:b:0.5-.5]", 10, "ends before it begins"),
        ('("a", "b").blend(1)', 18, "1 weights for 2 prompts"),
        ('("a", "b").blend(1, 2, 3)', 18, "3 weights for 2 prompts"),
        ('("a", "b").blend(1, -1)', 12, "add up to nothing"),
        ('("a", "b").blend(1, x)', 21, "not a number"),
        ('("a", "b").blend(1,)', 20, "not a number"),
        ('("a", "b").blend(1, 1', 22, "never closed"),
        ('("a", "b").blend(1, 1) c', 23, "whole prompt"),
        ('("a", "b").mix(1, 1)', 12, "none of .blend()"),
        ('("a", "b").schedule()', 12, "0 ranges for the 1 prompts"),
        ('("a", "b").schedule(10)', 21, "no range"),
        ('("a", "b").schedule(20-10)', 24, "ends before it begins"),
        ('("a", "b", "c").schedule(10-20, 15-30)', 33, "begins before"),
        ('("a", "b", "c").schedule(10-20, 5-8)', 33, "begins before"),
        ('("a AND b", "c").blend()', 5, "composition"),
        (r'("\"\\(\"", "a (b:1e9)").blend()', 19, "beyond"),
        (r'("\"x\" (b:1e9)", "c").blend()', 12, "beyond"),
        ('("a").and():2', 13, "only prompt"),
    ],
)
def test_what_makes_no_sense_is_refused_where_it_stands(written: str, place: int, reason: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse(written, "negative_prompt")
    assert raised.value.message.startswith(f"negative_prompt: character {place}: ")
    assert reason in raised.value.message
    assert raised.value.param == "negative_prompt"


def nested(depth: int) -> str:
    return "x" if depth == 0 else '("{}").and()'.format(nested(depth - 1).replace("\\", "\\\\").replace('"', '\\"'))


def test_calls_are_at_most_four_deep_and_places_are_those_of_the_whole_text() -> None:
    prompt = parse(nested(4))
    for _ in range(4):
        assert isinstance(prompt, Conjunction)
        prompt = prompt.parts[0].prompt
    assert prompt == text("x")
    with pytest.raises(InvalidRequest, match="more than 4 calls"):
        parse(nested(5))
    deep = nested(3).replace("x", "(x:1e9)")
    with pytest.raises(InvalidRequest, match=f"character {deep.index('1e9') + 1}: "):
        parse(deep)


def test_a_call_has_at_most_64_prompts() -> None:
    with pytest.raises(InvalidRequest, match="more than 64 prompts"):
        parse("({}).blend()".format(", ".join(['"a"'] * 65)))


@pytest.mark.parametrize("name", ["AND", "a-AND", "AND-b", "BREAK"])
def test_a_concept_may_have_the_name_of_a_word_that_means_something(name: str) -> None:
    assert parse(f"<{name}>") == (Concept(name),)
    assert parse(rf"\\<{name}>") == (Text("\\"), Concept(name))
    assert parse(f"a AND <{name}>") == Composition((Part(A), Part((Concept(name),))))


def test_an_escaped_bracket_is_no_concept_around_the_word() -> None:
    assert parse(r"\<AND>") == Composition((Part(text("<")), Part(text(">"))))
