"""Parsing takes linear time, and little of it. Nothing here holds an absolute time closely: machines differ."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator

import pytest
from compel import prompt_parser as compel

from serve.domain.text import Syntax
from serve.errors import InvalidRequest
from serve.prompts.parse import parse, words
from serve.prompts.places import MAX_CHARACTERS
from serve.prompts.templates import expand
from serve.prompts.written import written

PHRASE = "a (beautiful:1.2) portrait of [a cat:a dog:0.5], (((highly detailed))), by <artist>, [red|blue] sky, "
"""Some 25 tokens of a CLIP, much of it syntax."""
COMPELS = 'a beautiful++ portrait of (a big cat)1.3, ("highly detailed")--, sharp focus, soft light, red sky, '
UNITS = [
    *["(", "[", ")", "]", "(a", "[a", ":1.", "(:", "<a:", "<a:x>", "\\", "(a:1 ", ": ", "[|", "<aaaa", "(a)[b]", "[a:"],
    *["[a:b:3]", "[a|b]", "a BREAK ", " AND ", "A", "\\\\", '"', '("a" ', '("a",', "('", '" "', "([)]", "[a:1-", ":9 "],
    *["a++ ", "(a)++ ", "(a b", '"a', '"a = ', "( = ", '(" ', "-", "+", "+a", ".attend(", "a.", ",", "\\(", '\\"', " "],
    *["{", "{a|", "}", "{a}|", "\n", "\u00a0", "9", "(a:1.5)", "<", ">", "e", ":e", "<b>", '("a AND ', '", ("'],
]


@pytest.fixture(autouse=True, scope="module")
def swept() -> Iterator[None]:
    """What other tests have left is not searched for garbage while time is taken."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """Of this process's own time, the least of some runs."""
    best = float("inf")
    for _ in range(times):
        started = time.process_time()
        with contextlib.suppress(InvalidRequest):
            work()
        best = min(best, time.process_time() - started)
    return best


@pytest.mark.parametrize("repeats", [1, 6])
def test_it_is_ten_times_as_fast_as_compels_parser(repeats: int) -> None:
    oracle = compel.PromptParser()
    theirs = seconds(lambda: oracle.parse_conjunction(COMPELS * repeats))
    assert seconds(lambda: parse(COMPELS * repeats, syntax=Syntax.COMPEL), times=5) * 10 < theirs
    assert seconds(lambda: parse(PHRASE * repeats), times=5) * 10 < theirs


@pytest.mark.parametrize("syntax", [Syntax.A1111, Syntax.COMPEL])
@pytest.mark.parametrize("unit", UNITS)
def test_hostile_text_takes_linear_time(unit: str, syntax: Syntax) -> None:
    """Time per character must not grow with the text: quadratic time would make it 16 times as much."""

    def per_character(length: int, times: int) -> float:
        text = unit * (length // len(unit))
        return seconds(lambda: parse(text, syntax=syntax), times) / length

    short, long = per_character(MAX_CHARACTERS // 32, 3), per_character(MAX_CHARACTERS // 2, 2)
    assert long < 5 * short + 1e-7, (short, long)


@pytest.mark.parametrize("unit", UNITS)
def test_templates_and_what_is_written_take_linear_time(unit: str) -> None:
    def per_character(length: int, times: int) -> float:
        text = unit * (length // len(unit))
        return seconds(lambda: written(words(expand(text, {"a": "b"}, 0))), times) / length

    short, long = per_character(MAX_CHARACTERS // 64, 3), per_character(MAX_CHARACTERS // 4, 2)
    assert long < 5 * short + 1e-7, (short, long)
