import re
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.models.folder import ModelFolder
from serve.prompts.grammar import Span, parse
from serve.prompts.rows import lay_out, lowered
from serve.prompts.tokenizers import PromptTokenizer


@pytest.fixture(scope="session")
def t5(models: Mapping[str, ModelFolder]) -> PromptTokenizer:
    return PromptTokenizer(models["flux"].text[1])


def weighted_words(tokenizer: PromptTokenizer, prompt: str, length: int) -> list[tuple[int, float]]:
    row = lay_out(tokenizer, parse(prompt), length)
    assert len(row.token_ids) == length
    begin = length - tokenizer.room(length) - 1
    weights = row.weights or (1.0,) * length
    assert set(weights[:begin]) | set(weights[begin + row.used :]) <= {1.0}
    return list(zip(row.token_ids, weights, strict=True))[begin : begin + row.used]


def ids(tokenizer: PromptTokenizer, text: str) -> list[int]:
    return list(tokenizer.tokenize(text).ids)


def test_t5_weights_lie_on_the_words(t5: PromptTokenizer) -> None:
    """The space before a word belongs to its token, but the word decides the weight."""
    expected = [*[(i, 1.0) for i in ids(t5, "a")], *[(i, 1.5) for i in ids(t5, "red circle")]]
    expected += [(i, 1.0) for i in ids(t5, "on blue")]
    assert weighted_words(t5, "a (red circle:1.5) on blue", 64) == expected
    assert weighted_words(t5, "a( red circle:1.5) on blue", 64) == expected


def test_t5_tokens_across_a_weight_take_that_of_their_first_character(t5: PromptTokenizer) -> None:
    assert len(ids(t5, "circle")) == 1
    assert weighted_words(t5, "cir(cle:1.5)", 16) == [(ids(t5, "circle")[0], 1.0)]
    assert weighted_words(t5, "(cir:1.5)cle", 16) == [(ids(t5, "circle")[0], 1.5)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(), st.sampled_from([1.0, 0.5, 1.3])), max_size=8), st.sampled_from([2, 16, 77]))
def test_weights_never_change_t5s_tokens(t5: PromptTokenizer, parts: list[tuple[str, float]], length: int) -> None:
    escaped = [(re.sub(r"([()\[\]\\|])", r"\\\1", text), weight) for text, weight in parts]
    escaped = [(text, weight) for text, weight in escaped if not re.search("AND|BREAK|<", text)]
    plain = lay_out(t5, parse("".join(text for text, _ in escaped)), length)
    row = lay_out(t5, parse("".join(f"({text}:{weight})" for text, weight in escaped)), length)
    assert plain.weights is None
    assert (row.token_ids, row.used, row.cut, row.unknown, row.rest) == (
        plain.token_ids,
        plain.used,
        plain.cut,
        plain.unknown,
        plain.rest,
    )
    assert row.weights is None or set(row.weights) <= {1.0, *(weight for _, weight in escaped)}


@settings(deadline=None)
@given(st.lists(st.sampled_from(["red", "blue,", "x", "é", "star's", "qqq"]), min_size=1, max_size=40), st.data())
def test_weights_on_whole_words_never_change_tokens(
    tokenizer: PromptTokenizer, t5: PromptTokenizer, words: list[str], data: st.DataObject
) -> None:
    """The weight is on the words that it was written on, in both vocabularies."""
    factors = data.draw(st.lists(st.sampled_from([1.0, 0.5, 1.3]), min_size=len(words), max_size=len(words)))
    prompt = " ".join(f"({word}:{factor})" for word, factor in zip(words, factors, strict=True))
    for reader in (tokenizer, t5):
        expected = [(token, factor) for word, factor in zip(words, factors, strict=True) for token in ids(reader, word)]
        assert weighted_words(reader, prompt, 77) == expected[: reader.room(77)]
        if all(factor == 1.0 for factor in factors):
            assert lay_out(reader, parse(prompt), 77).weights is None


def test_weights_on_text_that_was_cut_are_no_weights(tokenizer: PromptTokenizer, t5: PromptTokenizer) -> None:
    prompt = "red " * 100 + "(blue:1.5)"
    for reader in (tokenizer, t5):
        row = lay_out(reader, parse(prompt), 77)
        assert row.weights is None
        assert row.token_ids == lay_out(reader, parse("red " * 101), 77).token_ids
        assert row.rest.endswith("blue")


@pytest.mark.parametrize("length", [1, 3, 4, 16])
def test_a_row_without_padding_is_the_padded_one_up_to_its_end(t5: PromptTokenizer, length: int) -> None:
    for prompt in ("red blue", "a (red:1.5) (blue:0.5) star", ""):
        padded = lay_out(t5, parse(prompt), length)
        row = lay_out(t5, parse(prompt), length, padded=False)
        assert row.token_ids == padded.token_ids[: padded.used + 1]
        assert row.weights == (None if padded.weights is None else padded.weights[: padded.used + 1])
        assert (row.used, row.cut, row.rest) == (padded.used, padded.cut, padded.rest)


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(alphabet="aÉİΣσ ß\n x") | st.text(), st.sampled_from([1.0, 0.5])), max_size=6))
def test_small_letters_are_those_of_the_whole_text(parts: list[tuple[str, float]]) -> None:
    spans = [Span(text, weight) for text, weight in parts]
    text = "".join(span.text for span in spans)
    low = lowered(spans)
    assert "".join(span.text for span in low) == text.lower().strip()
    assert all(span.text for span in low)


def test_small_letters_keep_their_weights() -> None:
    """A capital may become two letters, and a Greek sigma depends on what follows it."""
    spans = [Span("  İİ", 1.5), Span("ΟΔΟΣ", 1.0), Span("Σ ", 0.5), Span(" ", 2.0)]
    assert lowered(spans) == (Span("i\u0307i\u0307", 1.5), Span("οδοσ", 1.0), Span("ς", 0.5))
    assert lowered([Span(" ", 2.0)]) == ()


def test_unknown_text_is_counted_where_it_is_used(t5: PromptTokenizer) -> None:
    row = lay_out(t5, parse("red 緑 blue 緑"), 77)
    assert row.unknown == 2
    assert lay_out(t5, parse("red " * 5 + "緑"), 6).unknown == 0


def test_a_t5_row_of_one_token_is_its_end(t5: PromptTokenizer) -> None:
    row = lay_out(t5, parse("(red:1.2) blue"), 1)
    assert (row.token_ids, row.weights, row.used, row.rest) == ((t5.eos,), None, 0, "red blue")
