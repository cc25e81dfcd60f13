"""In which words orders are made: what repeats, how often, and that the seed fixes it."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.prompts import Wording
from loadtest.workload import Fixed, Prompts, Texts, Unique, Zipf
from serve.shapes.expectation import of_prompt

SEEDS = st.integers(0, 2**32)
TEXTS: st.SearchStrategy[Texts] = st.one_of(
    st.builds(Unique, scenes=st.integers(1, 3)),
    st.builds(Zipf, a=st.floats(0, 3), texts=st.integers(1, 30), scenes=st.integers(1, 2)),
    st.builds(Fixed, text=st.one_of(st.none(), st.just("a red circle"))),
)
PROMPTS = st.builds(Prompts, positive=TEXTS, negative=TEXTS, empty_negative=st.floats(0, 1))


def said(prompts: Prompts, seed: int, count: int) -> list[tuple[str, str]]:
    wording = Wording(prompts, seed)
    return [wording.next() for _ in range(count)]


@given(PROMPTS, SEEDS)
@settings(max_examples=30, deadline=None)
def test_the_seed_fixes_every_word(prompts: Prompts, seed: int) -> None:
    assert said(prompts, seed, 20) == said(prompts, seed, 20)


@given(PROMPTS, TEXTS, SEEDS)
@settings(max_examples=20, deadline=None)
def test_how_one_side_repeats_changes_nothing_in_the_other(prompts: Prompts, other: Texts, seed: int) -> None:
    first = said(prompts, seed, 15)
    assert [positive for positive, _ in said(prompts.model_copy(update={"negative": other}), seed, 15)] == [
        positive for positive, _ in first
    ]
    assert [negative for _, negative in said(prompts.model_copy(update={"positive": other}), seed, 15)] == [
        negative for _, negative in first
    ]


@given(SEEDS, st.integers(1, 3))
@settings(max_examples=5, deadline=None)
def test_unique_never_repeats(seed: int, scenes: int) -> None:
    prompts = Prompts(positive=Unique(scenes=scenes), negative=Unique(scenes=scenes), empty_negative=0)
    for side in zip(*said(prompts, seed, 500), strict=True):
        assert len(set(side)) == 500


@given(SEEDS, st.floats(0.5, 1.5))
@settings(max_examples=10, deadline=None)
def test_zipf_frequencies_rank_as_they_should(seed: int, a: float) -> None:
    """Counts lie within five standard deviations of n * k**-a / H, and there are no more texts than were said."""
    count, texts = 3000, 20
    prompts = Prompts(positive=Zipf(a=a, texts=texts), empty_negative=1)
    seen = sorted(Counter(text for text, _ in said(prompts, seed, count)).values(), reverse=True)
    assert len(seen) <= texts
    whole = sum(rank**-a for rank in range(1, texts + 1))
    for rank in (1, 2, 4):
        expected = count * rank**-a / whole
        assert abs(seen[rank - 1] - expected) < 5 * expected**0.5, (rank, seen, expected)


def test_an_empty_negative_is_a_share_of_its_own_and_fixed_is_one_text() -> None:
    prompts = Prompts(positive=Fixed(), negative=Fixed(text="a blue ring"), empty_negative=0.3)
    pairs = said(prompts, 3, 2000)
    assert len({positive for positive, _ in pairs}) == 1
    counts = Counter(negative for _, negative in pairs)
    assert set(counts) == {"", "a blue ring"}
    assert 500 < counts[""] < 700
    assert said(Prompts(positive=Fixed()), 3, 1)[0][0] != said(Prompts(positive=Fixed()), 4, 1)[0][0]


def test_they_are_in_the_language_of_the_shipped_model() -> None:
    """Its judge understands them, one caption at a time."""
    for text, _ in said(Prompts(positive=Unique()), 1, 200):
        assert of_prompt(text).things or "background" in text, text
