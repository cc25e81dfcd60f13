"""Prompts for property tests, and the plainest reading of them: which words there are at a step, and what each weighs.

The readings go by what A1111 documents, word by word, and share nothing with `serve.prompts.timeline`.
"""

from collections.abc import Iterator

from hypothesis import strategies as st

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
    Word,
    Words,
)
from serve.prompts.normal import normal_words

SIGNS = "ab \t(()[[]]:::||\\\\<>{}\"'.,-+~=0159eé字\u00a0"
FRAGMENTS = st.sampled_from(
    [
        *["cat", "a b", " AND ", "BREAK", "xANDy", "(", ")", "[", "]", ":", "|", "\\", "<c>", "<lora:a:1>", "é", "\n"],
        *[":1.5)", ":3]", ":0.5]", ":3-9]", ":1e9)", ":nan)", " :0.5", "++", "--", "(a b)", ".attend(", ".swap("],
        *['("a", "b")', ".blend(", ".and(", ".schedule(", ", ", '"', '\\"', "1)", "0.5", "no_normalize)", "5-9)"],
        *["{x}", "{a|b}", "\\{"],
    ]
)
PIECED = st.lists(FRAGMENTS, max_size=14).map("".join)
TEXTS = st.text(alphabet=SIGNS, max_size=40) | PIECED | st.text(max_size=40)
"""What anybody might send: signs at random, and pieces of syntax put together wrongly."""


def weights_of(words: Words) -> list[tuple[str, float]]:
    """Runs of text of one weight; a concept is written `<name>`, and a break is BREAK of weight 0."""
    runs: list[tuple[str, float]] = []
    for text, weight in _runs(words, 1.0, 0):
        if runs and runs[-1][1] == weight:
            runs[-1] = (runs[-1][0] + text, weight)
        else:
            runs.append((text, weight))
    return runs


def _runs(words: Words, factor: float, steps: int) -> Iterator[tuple[str, float]]:
    for word in words:
        match word:
            case Text(text):
                yield text, factor * 1.1**steps
            case Concept(name):
                yield f"<{name}>", factor * 1.1**steps
            case Break():
                yield "BREAK", 0.0
            case Weighted(inner, own, power):
                yield from _runs(inner, factor * own, steps + power)
            case _:
                raise AssertionError(f"{word} changes with the step")


def at_step(words: Words, step: int, steps: int) -> Words:
    """The words of step `step`, counted from 0, of `steps`. Ramps are not for a single text."""
    return normal_words(tuple(_at_step(words, step, steps)))


def _at_step(words: Words, step: int, steps: int) -> Iterator[Word]:
    for word in words:
        match word:
            case Switch(before, after, when):
                yield from _at_step(before if step < when.step(steps) else after, step, steps)
            case Alternate(options):
                yield from _at_step(options[step % len(options)], step, steps)
            case Weighted(inner, factor, power):
                yield Weighted(tuple(_at_step(inner, step, steps)), factor, power)
            case _:
                yield word


def whens() -> st.SearchStrategy[When]:
    steps = st.integers(1, 500).map(lambda step: When(float(step)))
    return steps | st.floats(0.0, 1.0).map(lambda share: When(share, share=True))


def _ranges() -> st.SearchStrategy[tuple[When, When]]:
    return st.tuples(whens(), whens()).filter(lambda two: two[0].share != two[1].share or two[0].value < two[1].value)


def texts() -> st.SearchStrategy[str]:
    printable = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])
    return st.text(alphabet=SIGNS, max_size=6) | st.text(alphabet=printable, max_size=6) | PIECED


def words_trees() -> st.SearchStrategy[Words]:
    """Any words, in normal form or not."""
    plain = texts().map(Text) | st.sampled_from(
        [
            Concept("c"),
            Concept("A-1_x"),
            Concept("AND"),
            Concept("x-AND"),
            Concept("BREAK"),
            Break(),
            Text("AND"),
            Text("BREAK"),
            Text(" "),
            Text('"'),
        ]
    )
    return st.recursive(st.lists(plain, max_size=3).map(tuple), lambda inner: _nested(plain, inner), max_leaves=8)


def _nested(plain: st.SearchStrategy[Word], inner: st.SearchStrategy[Words]) -> st.SearchStrategy[Words]:
    factors = st.sampled_from([1.0, 1.0, 1.5, 0.5, 0.0, -0.5, 1.1, 1e-7, 0.1 + 0.2])
    weighted = st.builds(Weighted, inner, factors, st.integers(-3, 3))
    switch = st.builds(Switch, inner, inner, whens())
    ramp = st.tuples(inner, inner, _ranges()).map(lambda three: Ramp(three[0], three[1], *three[2]))
    alternate = st.lists(inner, min_size=1, max_size=3).map(lambda options: Alternate(tuple(options)))
    return st.lists(st.one_of(plain, weighted, switch, ramp, alternate), max_size=4).map(tuple)


def prompt_trees() -> st.SearchStrategy[Prompt]:
    """Any prompt that text can say, in normal form or not; calls are at most two deep."""
    calls = _calls(words_trees() | _calls(words_trees()))
    single = words_trees() | calls
    composed = st.lists(st.builds(Part, single, _weights()), min_size=2, max_size=3)
    return single | composed.map(lambda parts: Composition(tuple(parts)))


def _weights() -> st.SearchStrategy[float]:
    return st.just(1.0) | st.floats(-1000.0, 1000.0)


def _calls(inner: st.SearchStrategy[Prompt]) -> st.SearchStrategy[Prompt]:
    positive = st.lists(st.builds(Part, inner, st.floats(0.01, 100.0)), min_size=1, max_size=3).map(tuple)
    any_sign = st.lists(st.builds(Part, inner, _weights()), min_size=1, max_size=3).map(tuple)
    blends = st.builds(Blend, positive) | st.builds(Blend, any_sign, st.just(False))
    bounds = st.lists(st.integers(1, 99), min_size=2, max_size=6, unique=True).map(sorted)
    schedules = st.builds(
        lambda base, prompt, ramp, ends: Scheduled(
            base,
            tuple(
                Entry(When(float(begin)), When(float(end)), prompt, ramp)
                for begin, end in zip(ends[::2], ends[1::2], strict=False)
            ),
        ),
        inner,
        inner,
        st.booleans(),
        bounds,
    )
    return blends | any_sign.map(Conjunction) | schedules
